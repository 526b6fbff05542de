"""Static networks: one concrete subnet as a plain torch module, with the interface of timm's models."""
import torch
from torch import nn

from ..search_space.block import Block, out_size
from ..search_space.encoding import subnet_config
from ..search_space.macro_arch import HEAD_STAGES
from .blocks import StaticBlock
from .ops.lsq_plus import quantised_ops
from .ops.op import resize

LOGITS = 'logits'


class Network(nn.Module):
    """A subnet (SubnetConfig); (N, 3, H, W) to (N, classes). Resizes its input to its own resolution.

    Without the config's last block it has no classifier and gives its features (N, num_features).
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.resolution, self._drop_rate = config, config.resolution, 0.0
        self.stages = nn.ModuleDict({name: nn.Sequential(*map(StaticBlock, blocks))
                                     for name, blocks in config.stages.items()})

    @classmethod
    def build(cls, supernet, subnet, num_classes=1000):
        """Randomly initialised network of a subnet string of a supernet string."""
        return cls(subnet_config(supernet, subnet, num_classes))

    @property
    def num_classes(self):
        """Outputs of the classifier, 0 without one."""
        return self.config.blocks[-1].cout if LOGITS in self.stages else 0

    @property
    def num_features(self):
        """Channels of the features that the classifier sees."""
        return [blocks[-1].cout for name, blocks in self.config.stages.items() if name != LOGITS][-1]

    head_hidden_size = num_features                     # timm's other name

    @property
    def drop_rate(self):
        """Probability of the dropout before the classifier."""
        return self._drop_rate

    @drop_rate.setter
    def drop_rate(self, probability):
        self._drop_rate = probability
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability

    def get_classifier(self):
        """The linear layer at the end, nn.Identity without one."""
        return self.stages[LOGITS][0].linear if LOGITS in self.stages else nn.Identity()

    @torch.no_grad()
    def reset_classifier(self, num_classes, global_pool='avg'):
        """A new, random classifier of `num_classes`, quantised as the old one was; 0: none.

        Its LSQ+ scales are initialised by the first batch. Pooling is the average that is part of the network.
        """
        if global_pool not in (None, 'avg'):
            raise ValueError(f'global_pool {global_pool!r}: the network pools itself, by the average (avg)')
        body = {name: blocks for name, blocks in self.config.stages.items() if name != LOGITS}
        like, last = next(self.parameters()), quantised_ops(self)[-1]
        if LOGITS in self.stages:
            del self.stages[LOGITS]
        self.config = self.config._replace(stages=body)
        if num_classes:
            body[LOGITS] = [Block('LogitsBlock', 1, self.num_features, num_classes, kernel=0, stride=0)]
            head = StaticBlock(*body[LOGITS]).to(like.device, like.dtype).train(self.training)
            for attribute in ('nbits_w', 'nbits_a', 'zero_points'):
                setattr(head.linear, attribute, getattr(last, attribute))
            self.stages[LOGITS] = nn.Sequential(head).train(self.training)
            self.drop_rate = self._drop_rate

    def forward_features(self, x):
        """(N, 3, H, W) to the mixed features (N, num_features, 1, 1)."""
        x = resize(x, self.resolution)
        for name, stage in self.stages.items():
            if name != LOGITS:
                x = stage(x)
        return x

    def forward_head(self, x, pre_logits=False):
        """(N, num_features, 1, 1) to (N, classes); pre_logits: to what the linear layer sees, (N, num_features)."""
        if LOGITS not in self.stages:
            return x.flatten(1)
        head = self.stages[LOGITS]
        return head[0].dropout(head[0].flatten(x)) if pre_logits else head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def named_blocks(network):
    """(name, StaticBlock) of a Network in order; the name is the prefix of the block's state-dict keys."""
    for stage, blocks in network.stages.items():
        for i, block in enumerate(blocks):
            yield f'stages.{stage}.{i}', block


def io_sizes(network):
    """((C, r, r) of a Network's images, outputs): classes, or all features of one without a classifier."""
    blocks, hw = network.config.blocks, network.resolution
    for block in blocks:
        hw = 1 if block.name in ('FeatureMixBlock', 'LogitsBlock') else out_size(hw, block.stride)
    return (blocks[0].cin, network.resolution, network.resolution), blocks[-1].cout * hw * hw


class FeatureMaps(nn.Module):
    """The maps of a Network's stages `names`; (N, 3, H, W) to a list of (N, C, H/r, W/r), rounded up.

    Unlike the network it does not resize its input: the maps fit any image. Its weights have the network's names.
    """

    def __init__(self, network, names):
        super().__init__()
        last = max(list(network.stages).index(name) for name in names)
        self.names, self.config = tuple(names), network.config
        self.stages = nn.ModuleDict(list(network.stages.items())[:last + 1])

    def forward(self, x):
        maps = {}
        for name, stage in self.stages.items():
            maps[name] = x = stage(x)
        return [maps[name] for name in self.names]


def feature_stages(config):
    """[(stage, channels, reduction)] of a SubnetConfig: the last stage at each size of the map, the head left out."""
    last, reduction = {}, 1
    for name, blocks in config.stages.items():
        if name in HEAD_STAGES:
            break
        reduction *= blocks[0].stride
        last[reduction] = (name, blocks[-1].cout, reduction)
    return list(last.values())
