"""Tables of block latencies: nn-Meter's JSON files, and fitted platforms (data/latency/<platform>/).

nn-Meter: {"<name>_<hw>_<cin>_<cout>_<k>_<e>_<stride>_<act>": ms, …}; e is 0 for MobileNetV1 blocks, None for
stem and head, 0.5 / 1.0 / 1.5 for ResNet blocks, an integer otherwise.

A fitted platform: model.npz (KernelModel.save) and blocks.npz, the model's predictions for every block of its
spaces. The predictions also hold the corrections of single blocks and kernels, and make look-ups fast.
"""
import gzip
import json
import os
from functools import cache

import numpy as np

from .. import ROOT
from ..errors import one_line
from ..files import atomic_path, write_text
from ..search_space.block import Block
from .kernel_model import KernelModel, LatencyError

DATA = os.path.join(ROOT, 'data', 'latency')
RESOLUTION = 1e-4                        # resolution of predictions in blocks.npz, ms; an imported table keeps its own
MOST_SIZE = 2 ** 15 - 1               # of hw and channels in a table
MS_RANGE = 1e-6, 1e6                    # of a block's latency
COLUMNS = {'hw': np.int16, 'cin': np.int16, 'cout': np.int16, 'kernel_size': np.int8,      # of blocks.npz, in the
           'expand_ratio': np.float64, 'stride': np.int8}           # order of a Block; expand_ratio: 0 for none


def format_key(block):
    """`MobileNetV2ResBlock_112_16_16_3_4_1_relu6` of a Block."""
    e = block.expand
    if e is None:
        e = 0 if block.name.startswith('MobileNetV1') else None
    else:
        e = float(e) if block.name.startswith('ResNet') else f'{e:g}'
    return '_'.join(map(str, (*block[:5], e, *block[6:])))


def parse_key(key):
    """Block of a key. Raises ValueError for a key that format_key() would not write."""
    name, hw, cin, cout, k, e, stride, activation = key.split('_')
    e = None if e in ('None', '0') else float(e)
    block = Block(name, int(hw), int(cin), int(cout), int(k), e, int(stride), activation)
    if not (all(0 < value <= MOST_SIZE for value in block[1:4]) and 0 <= block.kernel < 128
            and 0 <= block.stride < 128 and (e is None or 0 < e < MOST_SIZE)):
        raise ValueError('sizes out of range')
    if format_key(block) != key:
        raise ValueError(f'written {format_key(block)} elsewhere')
    return block


def _unique(path):
    def pairs_hook(pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            keys = [key for key, _ in pairs]
            raise LatencyError(f'{path}: {next(k for k in keys if keys.count(k) > 1)}: given twice')
        return table
    return pairs_hook


def read_table(path):
    """{Block: ms} from a JSON block table (utf-8), perhaps gzipped. LatencyError names file, key and value."""
    try:
        with (gzip.open if str(path).endswith('.gz') else open)(path, 'rt', encoding='utf-8-sig') as file:
            table = json.load(file, object_pairs_hook=_unique(path))
    except OSError as error:
        raise LatencyError(f'{path or repr(path)}: {error.strerror or error}') from None
    except RecursionError:
        raise LatencyError(f'{path}: not a block table, but nested too deep') from None
    except ValueError as error:
        if isinstance(error, LatencyError):
            raise
        raise LatencyError(f'{path}: not JSON: {error}') from None
    if not isinstance(table, dict):
        raise LatencyError(f'{path}: not a JSON object of block latencies')
    blocks = {}
    for key, ms in table.items():
        try:
            block = parse_key(key)
        except ValueError as error:
            form = '<name>_<hw>_<cin>_<cout>_<k>_<e>_<stride>_<act>'
            raise LatencyError(f'{path}: {key}: not {form}: {error}') from None
        if isinstance(ms, bool) or not isinstance(ms, (int, float)) or not MS_RANGE[0] <= ms <= MS_RANGE[1]:
            raise LatencyError(f'{path}: {key}: {ms!r} is not a latency in ms')
        blocks[block] = float(ms)
    return blocks


def write_table(path, blocks):
    """Write {Block: ms} as a JSON block table, sorted, through a temporary name."""
    rows = sorted((format_key(block), float(ms)) for block, ms in blocks.items())
    write_text(path, json.dumps(dict(rows), indent=0))


def save_platform(folder, model, blocks):
    """Write a fitted platform: the model's nets, and its predictions of `blocks`. Returns the folder.

    blocks: a list of Blocks, or {Block: ms} of latencies to keep to the last digit instead of the predictions.
    """
    given, blocks = blocks, sorted(blocks, key=lambda block: tuple(value or 0 for value in block))
    types = sorted({(block.name, block.activation) for block in blocks})
    arrays = {column: np.array([value or 0 for value in values], dtype)
              for (column, dtype), values in zip(COLUMNS.items(), list(zip(*blocks))[1:7])}
    arrays['type'] = np.array([types.index((block.name, block.activation)) for block in blocks], np.int8)
    if isinstance(given, dict):
        arrays['ms'] = np.array([given[block] for block in blocks], np.float64)
    else:
        arrays['ms'] = np.maximum(np.round(model.predict_blocks(blocks) / RESOLUTION), 1).astype(np.int32)
    _save(os.path.join(folder, 'model.npz'), model.save)
    _save(os.path.join(folder, 'blocks.npz'),
          lambda file: np.savez_compressed(file, types=np.array(types), **arrays))
    return folder


def _save(path, write):
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        write(file)


@cache
def load_platform(folder):
    """({Block: ms}, KernelModel) of a fitted platform; the table is shared, do not change it."""
    try:
        with np.load(os.path.join(folder, 'blocks.npz'), allow_pickle=False) as data:
            table = _read_blocks(data)
        return table, KernelModel.load(os.path.basename(folder), os.path.join(folder, 'model.npz'))
    except Exception as error:              # a damaged zip or array can raise anything
        raise LatencyError(f'{folder}: not a fitted latency platform: {one_line(error)[:200]}') from None


def _read_blocks(data):
    types, ms = data['types'].tolist(), data['ms']
    columns = {name: data[name] for name in (*COLUMNS, 'type')}
    if len({array.shape for array in (ms, *columns.values())}) > 1 or ms.ndim != 1 or not len(ms):
        raise ValueError('blocks.npz: its columns are not of one length')
    ms = ms if ms.dtype.kind == 'f' else (ms * RESOLUTION).round(4)
    if not (np.isfinite(ms) & (ms > 0)).all():
        raise ValueError('blocks.npz: latencies that are no positive numbers')
    columns = {name: array.tolist() for name, array in columns.items()}
    columns['expand_ratio'] = [e or None for e in columns['expand_ratio']]
    names, activations = zip(*(types[kind] for kind in columns.pop('type')))
    return dict(zip(zip(names, *columns.values(), activations), ms.tolist()))
