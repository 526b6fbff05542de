"""What a step does to a device, counted without one: tensors on `meta` take the branches of every device but a CPU.

Meta tensors have shapes and no values: a value that is asked for (item, cpu, nonzero) is an error of torch's. They need
no seconds for numbers, so published sizes can be run. (Fake tensors on `cuda` would need a driver for the backward
pass.)
"""
import collections
import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# no kernel: views, allocations, bookkeeping
FREE = ('view', '_unsafe_view', 'slice', 'detach', 'alias', 'expand', 't', 'transpose', 'permute', 'unsqueeze',
        'squeeze', 'select', 'split', 'as_strided', 'empty', 'empty_like', 'empty_strided', 'new_empty',
        'new_empty_strided', 'unbind', 'chunk', '_reshape_alias', 'lift_fresh')
# operations on each element, whose results' shapes need none of torch's (slow) ways to find them
ELEMENTWISE = ('abs', 'add', 'clamp', 'clamp_min', 'div', 'eq', 'mul', 'round', 'sgn', 'sub')
# on CUDA these add in an order of chance, and --deterministic refuses them: of torch.use_deterministic_algorithms()'s
# list those of networks such as ours
BY_CHANCE = {'_adaptive_avg_pool2d_backward', 'adaptive_max_pool2d_backward', 'upsample_bilinear2d_backward',
             'upsample_bicubic2d_backward', 'reflection_pad2d_backward', 'replication_pad2d_backward', 'cumsum',
             'scatter_add', 'scatter_add_', 'scatter_reduce', 'index_add_', 'put_', 'histc', 'bincount',
             'nll_loss2d_forward', 'embedding_dense_backward', 'grid_sampler_2d_backward', 'kthvalue'}
KERNELS = {'spaceevo::fake_quantise_backward': 2}       # operations of more than one kernel
TINY = 4096                 # elements: a kernel of fewer costs its launch, not its bytes


class Launches(TorchDispatchMode):
    """Inside, counts kernels (`count`), those of few elements (`tiny`), and bytes read and written (`bytes`).

    AssertionError where tensors of two devices meet in an operation, one leaves the device, or --deterministic would
    refuse it.
    """

    def __init__(self):
        super().__init__()
        self.count = self.tiny = self.bytes = 0
        self.kinds = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix('aten::').partition('.')[0]
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name in FREE:
            return function(*args, **(kwargs or {}))
        if kwargs or any(isinstance(arg, (list, tuple)) for arg in args):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert name not in BY_CHANCE, f'{function}: not deterministic on CUDA'
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        assert len(devices) < 2, f'{function}: tensors on {" and ".join(sorted(devices))}'
        result = self._elementwise(name, tensors, kwargs)
        if result is None:
            result = function(*args, **(kwargs or {}))
        tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == 'meta' for tensor in tensors):
            kernels = KERNELS.get(name, 1)
            self.kinds[name] += kernels
            self.count += kernels
            self.tiny += max(tensor.numel() for tensor in tensors) < TINY
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result

    @staticmethod
    def _elementwise(name, tensors, kwargs):
        """The result of a plain elementwise operation, None of another one."""
        if kwargs or not tensors or any(tensor.device.type != 'meta' for tensor in tensors):
            return None
        first = tensors[0]
        if name.endswith('_') and name[:-1] in ELEMENTWISE and not any(t.numel() > first.numel() for t in tensors):
            return first
        largest = max(tensors, key=lambda t: (t.numel(), t.ndim))
        if name not in ELEMENTWISE or any(t.shape != largest.shape and t.numel() != 1 for t in tensors):
            return None
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        return torch.empty_like(largest, dtype=torch.bool if name == 'eq' else dtype)


def kept_bytes(model, run):
    """Bytes that autograd keeps of run() (a tensor) for its backward pass: every storage once, the model's not."""
    own, storages = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in own:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in storages.values())
