"""Static networks: one concrete subnet as a plain torch module."""
from torch import nn

from ..search_space.encoding import subnet_config
from .blocks import Block
from .complexity import block_sizes
from .ops.op import resize


class Network(nn.Module):
    """A subnet (SubnetConfig); (N, 3, H, W) to (N, classes). Resizes its input to its own resolution."""

    def __init__(self, config):
        super().__init__()
        self.config, self.resolution = config, config.resolution
        names = dict.fromkeys(block.stage for block in config.blocks)
        self.stages = nn.ModuleDict({
            name: nn.Sequential(*(Block(block.name, block_sizes(block))
                                  for block in config.blocks if block.stage == name)) for name in names})

    @classmethod
    def build(cls, supernet, subnet, num_classes=1000):
        """Randomly initialised network of a subnet string of a supernet string."""
        return cls(subnet_config(supernet, subnet, num_classes))

    def forward_features(self, x):
        """(N, 3, H, W) to the mixed features (N, 1920, 1, 1)."""
        x = resize(x, self.resolution)
        for name, stage in self.stages.items():
            if name != 'logits':
                x = stage(x)
        return x

    def forward(self, x):
        return self.stages['logits'](self.forward_features(x))
