"""Checkpoints: read without running foreign code, loaded strictly, written whole or not at all.

Published checkpoints are dictionaries with the weights under 'state_dict' or 'model', keys perhaps beginning
with `module.`, and with objects of the original repository beside them ('args'). Ours hold 'state_dict'.
"""
import argparse
import collections
import contextlib
import io
import math
import os
import pickle
import types
from collections.abc import Mapping

import numpy as np
import torch

from ..errors import UserError, one_line
from ..files import atomic_path
from ..modeling.ops.lsq_plus import WEIGHT_BITS
from ..modeling.ops.zero_points import ZERO_POINTS

WEIGHTS = ('state_dict', 'model')           # where checkpoints keep their weights
_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
           torch.float32, torch.float64)
# settings that older checkpoints do not name: what they were
_LATER_SETTINGS = {'accumulate': 1, 'smallest_freq': 1, 'class_weights': 'none', 'weight_bits': 8,
                   'zero_points': 'real'}
_SHOWN = 3                                  # keys that an error message names


def checkpoint_name(quant):
    """lsq.pth (int8) or checkpoint.pth (fp32)."""
    return 'lsq.pth' if quant else 'checkpoint.pth'


def checkpoint_folder(root, supernet, align_sample=False):
    """<root>/<supernet>-align0, or -align1."""
    return os.path.join(root, f'{supernet}-align{int(align_sample)}')


def precision(quant):
    """int8 or fp32."""
    return 'int8' if quant else 'fp32'


class ForeignObject:
    """What an object of an unknown class becomes: it takes anything and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    add = extend = append

    def __repr__(self):
        return f'<{type(self).__module__}.{type(self).__name__}, not loaded>'


def _encode(text, encoding='latin1'):
    """codecs.encode as pickles of numpy scalars use it, for this one encoding."""
    return text.encode('latin1')


def _allowed():
    """{(module, name): object} of what a checkpoint's pickle may name: data, and functions that build data."""
    rebuild, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed = {('collections', 'OrderedDict'): collections.OrderedDict,
               ('argparse', 'Namespace'): argparse.Namespace, ('_codecs', 'encode'): _encode,
               ('numpy', 'dtype'): np.dtype, ('numpy', 'ndarray'): np.ndarray, ('torch', 'Size'): torch.Size,
               ('torch', 'device'): torch.device}
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):      # before and since numpy 2
        allowed |= {(module, '_reconstruct'): rebuild, (module, 'scalar'): scalar}
    for module in ('__builtin__', 'builtins'):
        allowed |= {(module, kind.__name__): kind for kind in (set, frozenset, slice, complex, bytearray)}
    allowed |= {('torch._utils', name): getattr(torch._utils, name)
                for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter')}
    allowed |= {('torch', name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return allowed | {('torch', name): value for name, value in vars(torch).items()
                      if name.endswith('Storage') and isinstance(value, type)}


_ALLOWED = _allowed()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        return type(name, (ForeignObject,), {'__module__': module})


def _load(file, **kwargs):
    return _Unpickler(file, **kwargs).load()


# what torch.load asks of its pickle_module
_inert_pickle = types.SimpleNamespace(Unpickler=_Unpickler, load=_load, UnpicklingError=pickle.UnpicklingError,
                                      __name__='inert_pickle')


def load_checkpoint(path):
    """What a checkpoint holds, on the CPU: torch's formats, or *.safetensors (then the weights).

    No code in the file runs: plain data is read by torch's own weights-only reader, and where the file holds
    more than that, objects of unknown classes become ForeignObjects. Raises UserError where there is no such
    file or it cannot be read.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint')
    try:
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file
            return load_file(path)
        try:
            found = torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError:
            found = torch.load(path, map_location='cpu', weights_only=False, pickle_module=_inert_pickle)
        if found is None:
            raise ValueError('it holds None')
        return found
    except Exception as error:              # a damaged pickle can raise anything
        reason = one_line(error)[:120]
        raise UserError(f'{path}: not a checkpoint that can be read ({reason})') from None


def _stripped(key):
    while key.startswith('module.'):
        key = key[len('module.'):]
    return '' if key == 'module' else key


def model_state(checkpoint):
    """The weights {name: tensor} of a checkpoint, or of a state dict itself, `module.` prefixes taken away.

    The metadata of state dicts is kept: it says whether LSQ+ scales are initialised.
    """
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        held = [checkpoint[name] for name in WEIGHTS if isinstance(checkpoint.get(name), Mapping)]
        state = held[0] if held else checkpoint
    if not (isinstance(state, Mapping) and state
            and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())):
        raise UserError(f'no weights in it: expected a state dict, or one under {" or ".join(WEIGHTS)}')
    odd = next((key for key, value in state.items() if not _is_plain(value)), None)
    if odd is not None:
        raise UserError(f'{odd}: not a dense tensor of plain numbers, but {_kind(state[odd])}')
    weights = collections.OrderedDict((_stripped(key), value) for key, value in state.items())
    if hasattr(state, '_metadata'):
        weights._metadata = _metadata_of(state)
    return weights


def _is_plain(tensor):
    return (tensor.layout is torch.strided and tensor.device.type == 'cpu' and not tensor.is_nested
            and tensor.dtype in _DTYPES)


def _kind(tensor):
    return f'{tensor.layout} {tensor.dtype} on {tensor.device.type}'


def _metadata_of(state):
    """{module: {name: number}} of a state dict's metadata, as far as it is that."""
    found = state._metadata if isinstance(state._metadata, Mapping) else {}
    return {_stripped(key): {name: value for name, value in values.items() if isinstance(value, int)}
            for key, values in found.items() if isinstance(key, str) and isinstance(values, Mapping)}


def quantisation_in(checkpoint, path):
    """What lsq_plus.requantise() takes, as far as a checkpoint (dict) says it: older ones have 8 bits and real zero
    points. UserError names the file where it is none of what there is.
    """
    known = {'weight_bits': WEIGHT_BITS, 'zero_points': ZERO_POINTS}
    found = {key: checkpoint[key] for key in known if key in checkpoint}
    for key, value in found.items():
        if type(value) is not type(known[key][0]) or value not in known[key]:
            raise UserError(f'{path}: damaged: {key} {str(value)[:60]}')
    return found


def load_weights(model, source, what='model', rename=None, optional=()):
    """Load a checkpoint (path, checkpoint or state dict) into `model`; returns the checkpoint.

    Strict: missing, unexpected and mismatching keys are one UserError that names the file and `what`, and
    the model is then as it was. rename: function from a state dict to one with the model's names; optional:
    endings of keys that may be missing.
    """
    name, checkpoint = what, source
    if isinstance(source, (str, os.PathLike)):
        name, checkpoint = os.fspath(source), load_checkpoint(source)
    try:
        weights = model_state(checkpoint)
    except UserError as error:
        raise UserError(f'{name}: {error}') from None
    if rename:
        weights = rename(weights)
    wanted = model.state_dict()
    may_lack = ('num_batches_tracked', *optional)           # which old files do not have
    broken = [key for key in wanted if key in weights and wanted[key].is_floating_point()
              and not (weights[key].is_floating_point() and bool(weights[key].to(wanted[key].dtype).isfinite().all())
                       and not (key.endswith('running_var') and bool((weights[key] < 0).any())))]
    problems = [_list('missing', [key for key in wanted if key not in weights and not key.endswith(may_lack)]),
                _list('unexpected', [key for key in weights if key not in wanted]),
                _list('of another shape', [f'{key} {_shape(weights[key])} instead of {_shape(wanted[key])}'
                                           for key in weights if key in wanted
                                           and weights[key].shape != wanted[key].shape]),
                _list('with values that are no finite numbers, or negative variances', broken)]
    if any(problems):
        who = name if name == what else f'{name}: not the weights of {what}'
        raise UserError(f'{who}: keys ' + '; '.join(filter(None, problems)))
    model.load_state_dict(weights, strict=False)
    return checkpoint


def restore(path, checkpoint, settings, optimizer, progress, steps):
    """Go on from the checkpoint of a stopped run: loads the optimizer, returns {key: value} of `progress`.

    settings: what the run depends on, the same as the checkpoint's; progress: {key: type} of what it holds, with
    'step' from 0 to `steps`. UserError: begun with other settings, or a checkpoint that is damaged.
    """
    begun = checkpoint.get('settings')
    begun = _LATER_SETTINGS | (begun if isinstance(begun, Mapping) else {})
    for key, value in settings.items():
        if isinstance(begun.get(key), torch.Tensor) or begun.get(key) != value:
            raise UserError(f'{path}: begun with {key} {str(begun.get(key))[:60]}, not {value}; resume with the same, '
                            'or start over without --resume')
    found = {key: checkpoint.get(key) for key in progress}
    for key, kind in progress.items():
        value = found[key]
        wrong = not isinstance(value, kind) or kind is int and isinstance(value, bool)
        if wrong or kind is float and not math.isfinite(value) or key == 'step' and not 0 <= value <= steps:
            raise UserError(f'{path}: damaged: {key} {str(found[key])[:60]} in it; start over without --resume')
    state = checkpoint.get('optimizer')
    try:
        _check_shapes(state, optimizer)
        own = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, own):      # its buffers; settings are the script's
            group.update(values)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = one_line(error)[:100]
        raise UserError(f'{path}: damaged: not the state of its optimizer ({reason}); start over without --resume') \
            from None
    return found


def _check_shapes(state, optimizer):
    """What load_state_dict() does not check: ValueError for the state of other parameters."""
    parameters = dict(zip((i for group in state['param_groups'] for i in group['params']),
                          (p for group in optimizer.param_groups for p in group['params'])))
    for key, values in state['state'].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameters[key].shape:
                raise ValueError(f'{name} of shape {_shape(value)} instead of {_shape(parameters[key])}')


def _shape(tensor):
    return 'x'.join(map(str, tensor.shape)) or 'scalar'


def _list(kind, keys):
    if not keys:
        return ''
    return f'{len(keys)} {kind} ({", ".join(keys[:_SHOWN])}{", …" if len(keys) > _SHOWN else ""})'


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (dict) to `path`: on the disk when this returns, and never half of it.

    Where it cannot be written, raises UserError and what was at `path` is untouched.
    """
    data = io.BytesIO()                     # torch.save to a file ends in a RuntimeError when the disk is full
    torch.save(checkpoint, data)
    try:
        with atomic_path(path) as temporary, open(temporary, 'wb') as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        kept = '; the checkpoint that was there is untouched' if os.path.isfile(path) else ''
        raise UserError(f'{path}: cannot be written ({error.strerror or error}){kept}') from None


def _sync_folder(folder):
    """Make a rename durable, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
