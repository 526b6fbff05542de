"""What runs through a torch Network: ranges of its tensors on real images, and the inputs of its quantised ops."""
import contextlib

import torch

from ..errors import UserError
from ..modeling.ops.lsq_plus import QBase, quantize_activation


class Range:
    """Least and largest value of a tensor and its (height, width)."""

    def __init__(self):
        self.low, self.high, self.hw = float('inf'), float('-inf'), None

    def see(self, x):
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        self.hw = tuple(x.shape[2:])


@contextlib.contextmanager
def _hooks(network, see):
    """see(name, module, input, output) after every module of the network."""
    handles = [module.register_forward_hook(lambda m, args, out, name=name: see(name, m, args[0], out))
               for name, module in network.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe(network, batches):
    """{module name: Range of its output} over batches of images, network in eval mode as it is, fp32 or int8.

    `<name>.input` is that of a quantised op's input. LSQ+ scales that are not initialised yet are by the first batch.
    """
    ranges = {}

    def see(name, module, x, y):
        ranges.setdefault(name, Range()).see(y)
        if isinstance(module, QBase):
            ranges.setdefault(name + '.input', Range()).see(x)

    seen = 0
    with _hooks(network.eval(), see):
        for images in batches:
            seen += len(images)
            network(images)
    if not seen:
        raise UserError('no images to calibrate with')
    return ranges


@torch.no_grad()
def op_inputs(network, images):
    """({op name: its fake-quantised input}, logits) of an int8 Network."""
    inputs = {}

    def see(name, module, x, y):
        if isinstance(module, QBase):
            inputs[name] = quantize_activation(x, module.sa, module.nbits_a, module.offset(), False)

    with _hooks(network.eval(), see):
        logits = network(images)
    return inputs, logits
