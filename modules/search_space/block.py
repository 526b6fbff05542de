"""The one record of a block, from an encoding or a LUT row to its layers, its kernels and its latency."""
from typing import NamedTuple


class Block(NamedTuple):
    """A block at fixed sizes: type name, hw of its input (pixels), channels, kernel k, expand ratio e, stride.

    expand is None where the block type has none. hw is 0 where only the weights matter, which do not depend on it.
    Block tables write the linear layer with hw 1, kernel 0 and stride 0.
    """
    name: str
    hw: int
    cin: int
    cout: int
    kernel: int = 3
    expand: float | None = None
    stride: int = 1
    activation: str = 'relu'

    @property
    def choice(self):
        """(k, w, e): what a search space lets one choose of a block."""
        return self.kernel, self.cout, self.expand


def out_size(hw, stride):
    """Height and width after a convolution with padding k//2: hw / stride, rounded up."""
    return -(-hw // stride)
