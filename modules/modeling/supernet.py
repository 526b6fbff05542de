"""The supernet: one weight-sharing network that holds every subnet of a space."""
import dataclasses
import math
import random

from torch import nn

from ..search_space import sampling
from ..search_space.encoding import Supernet as Encoding
from ..search_space.encoding import parse_subnet, parse_supernet, subnet_config
from .dynamic_blocks import DynamicStage
from .network import Network
from .ops.op import resize


class Supernet(nn.Module):
    """Weight-sharing network of a space; (N, 3, H, W) to (N, classes).

    Supernet(encoding.Supernet, num_classes), or Supernet('onnxw', '151122', '023231', num_classes): the hyperspace,
    then block type and width window of each searched stage, as text or as numbers. align_sample: the attribute that
    sample_active_subnet() and mutate() go by where they are not told otherwise.

    A stage's weights are sized by its width window's largest width on the output side and by the previous
    stage's whole width list on the input side, so that weights fit between windows.
    """

    def __init__(self, encoding, *more, num_classes=1000):
        super().__init__()
        if not isinstance(encoding, Encoding):
            if len(more) < 2:
                encoding = parse_supernet(encoding)
            else:
                types, windows, *more = more
                encoding = parse_supernet('_'.join(''.join(map(str, part)) for part in (types, windows)), encoding)
        if more:
            num_classes, = more
        self.align_sample = False
        self.encoding, self.num_classes = encoding, num_classes
        stages = {}
        for stage in encoding.superspace.stages:
            cout = num_classes if stage.name == 'logits' else max(encoding.widths(stage.name))
            cin = max(encoding.superspace.input_widths(stage.name))
            stages[stage.name] = DynamicStage(stage, encoding.block_type(stage.name), cin, cout)
        self.stages = nn.ModuleDict(stages)
        self.set_max_subnet()

    @classmethod
    def build_from_str(cls, encoding, num_classes=1000):
        """Supernet of `onnxw-151122-023231`."""
        return cls(parse_supernet(encoding), num_classes)

    def initialize_weights(self, zero_last_gamma=True):
        """Random weights from torch's generator: He's normal by fan-out, linear layers 0.01.

        zero_last_gamma: the last batch norm of a block that always has a shortcut starts at 0, so that the block
        starts as its shortcut. Source: Goyal et al. 2017, section 5.1.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] / module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if zero_last_gamma:
            self.zero_last_gamma()

    def zero_last_gamma(self):
        """Start the last batch norm of every block that always has a shortcut at 0."""
        for stage in self.stages.values():
            for block in stage.blocks:
                last = block.last_norm()
                if last is not None:
                    nn.init.zeros_(last.weight)

    def set_dropout_rate(self, probability):
        """Of the dropout before the linear layer."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability

    @property
    def active_resolution(self):
        """Input resolution of the active subnet, pixels; it can be set to another one of the space."""
        return self.active_subnet.resolution

    @active_resolution.setter
    def active_resolution(self, resolution):
        self.set_active_subnet(dataclasses.replace(self.active_subnet, resolution=resolution))

    def set_active_subnet(self, subnet):
        """Make `subnet` (string or encoding.Subnet) the one that runs; EncodingError where the weights do not hold it.
        """
        self.active_subnet = parse_subnet(subnet, self.encoding, 'weights')
        for name, blocks in self.get_active_subnet_config().stages.items():
            self.stages[name].set_active(blocks[0].cin, [block.choice for block in blocks])
        return str(self.active_subnet)

    def set_max_subnet(self):
        """Activate the largest subnet; returns its encoding."""
        return self.set_active_subnet(sampling.max_subnet(self.encoding))

    def set_min_subnet(self):
        """Activate the smallest subnet; returns its encoding."""
        return self.set_active_subnet(sampling.min_subnet(self.encoding))

    sample_max_subnet, sample_min_subnet = set_max_subnet, set_min_subnet

    def sample_active_subnet(self, rng=random, align_sample=None):
        """Activate a random subnet drawn with `rng` (random.Random); returns its encoding."""
        align = self.align_sample if align_sample is None else align_sample
        return self.set_active_subnet(sampling.sample_subnet(self.encoding, rng, align))

    def mutate(self, subnet, arch_mutate_prob=0.3, resolution_mutate_prob=0.5, rng=random):
        """Activate a mutation of a subnet (sampling.mutate_subnet); returns its encoding."""
        return self.set_active_subnet(sampling.mutate_subnet(
            self.encoding, parse_subnet(subnet, self.encoding), rng, arch_mutate_prob, resolution_mutate_prob,
            self.align_sample))

    def crossover(self, first, second, rng=random):
        """Activate a child of two subnets (sampling.crossover_subnets); returns its encoding."""
        parents = (parse_subnet(subnet, self.encoding) for subnet in (first, second))
        return self.set_active_subnet(sampling.crossover_subnets(*parents, rng, self.align_sample))

    def get_active_subnet_config(self):
        """SubnetConfig of the active subnet: what a latency predictor takes."""
        return subnet_config(self.encoding, self.active_subnet, self.num_classes)

    def active_ops(self):
        """The quantised ops of the active subnet."""
        return [op for stage in self.stages.values() for op in stage.active_ops()]

    def get_active_subnet(self):
        """A static Network with copies of the active slices, which computes the same numbers."""
        network = Network(self.get_active_subnet_config())
        for name, stage in self.stages.items():
            for i, block in enumerate(stage.active_blocks):
                network.stages[name][i] = block.get_active_block()
        return network.train(self.training)

    def forward(self, x):
        x = resize(x, self.active_resolution)
        for stage in self.stages.values():
            x = stage(x)
        return x
