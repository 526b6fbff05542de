"""Block LUTs: the published CSV format, read strictly and written atomically.

A file holds random sub-stages of one stage, block type and width window and is called
`<superspace>/stage3_1_2.csv` or `.csv.gz`. One row a line, no header:

    sub-stage, 1x<cin>x<hw>x<hw>, NSR loss, FLOPs (M), params (M), predicted int8 latency (ms)
    5#96#8_5#128#8,1x48x20x20,0.2704,80.0384,0.7599,1.7129

hw is the height and width of the stage's input: the image resolution over Superspace.input_stride, rounded up. In
memory a row has the sub-stage's Blocks; it is text in its file only.
"""
import gzip
import os
import re
import zlib
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from .. import ROOT
from ..cli import note
from ..errors import UserError
from ..files import atomic_path
from ..search_space.block import out_size
from ..search_space.encoding import format_sub_stage, parse_block_id, sub_stage_blocks
from ..search_space.superspace import get_superspace

SUFFIXES = ('.csv', '.csv.gz')
SHIPPED = os.path.join(ROOT, 'data', 'block_lut')       # models of the published block LUTs, *.csv.gz
COLUMNS = ('sub-stage', 'input shape', 'NSR loss', 'FLOPs (M)', 'params (M)', 'latency (ms)')
_NUMBER = r'([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)'
_ROW = re.compile(r'([^,]+),1x([1-9][0-9]{0,5})x([1-9][0-9]{0,5})x\3,' + ','.join([_NUMBER] * 4))


class LutError(UserError):
    """A block LUT is missing, or a row of it is wrong; the message names file, line and value."""


class LutRow(NamedTuple):
    """A sub-stage, as its Blocks in order, with its NSR loss, flops and params (M) and latency (ms)."""
    blocks: list
    loss: float
    flops: float
    params: float
    latency: float

    @property
    def hw(self):
        """Pixels of the stage's input."""
        return self.blocks[0].hw


@dataclass(frozen=True)
class BlockLut:
    """The rows of one file, without their blocks, as arrays of shape (rows,)."""
    path: str
    hw: np.ndarray
    loss: np.ndarray
    flops: np.ndarray
    params: np.ndarray
    latency: np.ndarray

    def __len__(self):
        return len(self.hw)


def resolutions_of(hw, stride, step=16):
    """Image resolutions (multiples of `step` pixels) that give `hw` pixels after down-sampling by `stride`."""
    first = -(-((hw - 1) * stride + 1) // step) * step
    return range(max(first, step), hw * stride + 1, step)


def _refusal(line):
    """Why a line that does not match the format is wrong."""
    parts = line.split(',')
    if not line.strip():
        return 'an empty line'
    if len(parts) != len(COLUMNS):
        return f'{len(parts)} columns, expected {len(COLUMNS)}: {", ".join(COLUMNS)}'
    if not re.fullmatch(r'1x([1-9][0-9]{0,5})x([1-9][0-9]{0,5})x\2', parts[1]):
        return f'input shape {parts[1]!r} is not 1x<cin>x<hw>x<hw>'
    for name, value in zip(COLUMNS[2:], parts[2:]):
        if not re.fullmatch(_NUMBER, value):
            return f'{name} {value!r} is not a positive number'
    return 'malformed'


@cache
def _check_resolution(superspace, stage, hw):
    """ValueError where no image has `hw` pixels at the input of the stage."""
    space = get_superspace(superspace)
    stride, step = space.input_stride(stage), space.resolution_step
    if not resolutions_of(hw, stride, step):
        raise ValueError(f'input of {hw} pixels: no image resolution (a multiple of {step}) gives it at down-sampling '
                         f'{stride}')


def parse_row(space, block_id, line):
    """LutRow of a line without its line end; ValueError with the reason."""
    match = _ROW.fullmatch(line)
    if not match:
        raise ValueError(_refusal(line))
    cin, hw = int(match[2]), int(match[3])
    blocks = sub_stage_blocks(space, block_id, match[1], (1, cin, hw, hw))
    _check_resolution(space.name, block_id.stage, hw)
    values = [float(value) for value in match.groups()[3:]]
    for name, value in zip(COLUMNS[2:], values):
        if not 0 < value < float('inf'):
            raise ValueError(f'{name} {value:g} is not a positive number')
    return LutRow(blocks, *values)


def read_rows(path, superspace, lut_id):
    """LutRows, one by one, of a .csv or .csv.gz file whose rows must be sub-stages of `lut_id` (`stage3_1_2`).

    Raises LutError naming file, line and value at the first bad row.
    """
    space, path = get_superspace(superspace), os.fspath(path)
    block_id = parse_block_id(space, lut_id)
    try:
        with open(path, 'rb') as file:
            data = file.read()
        text = (gzip.decompress(data) if path.endswith('.gz') else data).decode('ascii')
    except UnicodeDecodeError as error:
        line = error.object.count(b'\n', 0, error.start) + 1
        raise LutError(f'{path}:{line}: not plain text (byte {error.object[error.start]:#x})') from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LutError(f'{path}: not a complete gzip file ({error})') from None
    except OSError as error:
        raise LutError(f'{path}: {error.strerror}') from None
    lines = text.split('\n')
    if lines == ['']:
        raise LutError(f'{path}: the file is empty')
    if lines[-1] == '':
        lines.pop()
    elif not re.search(r'\.[0-9]{4}\r?$', lines[-1]):
        raise LutError(f'{path}:{len(lines)}: the last row has neither a line end nor 4 decimals: cut off?')
    for number, line in enumerate(lines, 1):
        try:
            yield parse_row(space, block_id, line.removesuffix('\r'))
        except ValueError as error:
            raise LutError(f'{path}:{number}: {error}') from None


def read_block_lut(path, superspace, lut_id):
    """BlockLut of a file; LutError as read_rows()."""
    columns = zip(*((row.hw, *row[1:]) for row in read_rows(path, superspace, lut_id)))
    return BlockLut(os.fspath(path), *map(np.array, columns))


def lut_folder(lut_path, superspace):
    """The folder that holds stage*_*_*.csv[.gz]: <lut_path>/<superspace>, or `lut_path` where that is it."""
    space = get_superspace(superspace)
    for folder in (os.path.join(lut_path, space.name), lut_path):
        if os.path.isdir(folder) and any(re.fullmatch(r'stage[0-9]+_[0-9]+_[0-9]+\.csv(\.gz)?', name)
                                         for name in os.listdir(folder)):
            return folder
    raise LutError(f'{lut_path}: no block LUTs of {space.name} here: expected {space.name}/stage*_*_*.csv[.gz]')


def lut_files(lut_path, superspace, lut_ids=None):
    """{lut id: path} of `lut_ids`, default every block LUT of the hyperspace. LutError lists the missing ones.

    Among the shipped ones a *.csv, such as a published one that was copied there, wins over the *.csv.gz; a line says
    how many of the files are the shipped models of published ones.
    """
    space = get_superspace(superspace)
    folder = lut_folder(lut_path, space)
    shipped = os.path.realpath(folder) == os.path.realpath(os.path.join(SHIPPED, space.name))
    files, missing = {}, []
    for lut_id in lut_ids or space.lut_ids():
        found = [path for path in (os.path.join(folder, lut_id + suffix) for suffix in SUFFIXES)
                 if os.path.exists(path)]
        if len(found) > 1 and not shipped:
            raise LutError(f'{found[0]}: both this and {os.path.basename(found[1])} exist; keep one')
        if found:
            files[lut_id] = found[0]
        else:
            missing.append(lut_id)
    if missing:
        raise LutError(f'{folder}: {len(missing)} of {len(missing) + len(files)} block LUTs of {space.name} '
                       f'are missing: {" ".join(missing)}')
    models = sum(path.endswith('.gz') for path in files.values())
    if shipped and models:
        note(f'{folder}: {models} of {len(files)} block LUTs are the shipped models of the published ones '
             '(data/README.md); published *.csv copied there are used instead')
    elif shipped:
        note(f'{folder}: *.csv of yours are used instead of the shipped *.csv.gz')
    return files


def read_luts(lut_path, superspace, lut_ids=None):
    """{lut id: BlockLut} of `lut_ids`, default a whole hyperspace's.

    `lut_path` holds <superspace>/, or is that folder itself.
    """
    space = get_superspace(superspace)
    files = lut_files(lut_path, space, lut_ids)
    return {lut_id: read_block_lut(path, space, lut_id) for lut_id, path in files.items()}


def lut_resolutions(luts, superspace):
    """Image resolutions (pixels) every file of `luts` ({lut id: BlockLut}) has rows of, ascending.

    They are those of stage 1's files, the only ones that tell every resolution apart. Raises LutError naming
    file, line and value where a file lacks one of them or has a row of none of them.
    """
    space = get_superspace(superspace)
    reference, resolutions = None, {}
    for lut_id, lut in luts.items():
        stride = space.input_stride(parse_block_id(space, lut_id).stage)
        if reference is None:
            if any(len(resolutions_of(hw, stride, space.resolution_step)) > 1 for hw in lut.hw.tolist()):
                raise LutError(f'{lut.path}: its rows do not tell which image resolution they are of')
            reference = lut
            resolutions = {resolutions_of(hw, stride, space.resolution_step)[0]: int(np.argmax(lut.hw == hw)) + 1
                           for hw in sorted(set(lut.hw.tolist()))}
        expected = {out_size(resolution, stride) for resolution in resolutions}
        here = set(lut.hw.tolist())
        for resolution, line in resolutions.items():
            hw = out_size(resolution, stride)
            if hw not in here:
                raise LutError(f'{lut.path}: no row of resolution {resolution} (1x<cin>x{hw}x{hw}), which '
                               f'{reference.path}:{line} has')
        for hw in sorted(here - expected):
            raise LutError(f'{lut.path}:{int(np.argmax(lut.hw == hw)) + 1}: input of {hw} pixels belongs to none of '
                           f'the resolutions {" ".join(map(str, resolutions))} of {reference.path}')
    return tuple(resolutions)


def format_row(row):
    """The line of a LutRow, 4 decimals, no line end."""
    first = row.blocks[0]
    return (f'{format_sub_stage(block.choice for block in row.blocks)},1x{first.cin}x{first.hw}x{first.hw},'
            f'{row.loss:.4f},{row.flops:.4f},{row.params:.4f},{row.latency:.4f}')


def write_block_lut(path, rows):
    """Write LutRows to a .csv or .csv.gz file, under a temporary name first; the same rows give the same bytes."""
    data = ''.join(format_row(row) + '\n' for row in rows).encode('ascii')
    if str(path).endswith('.gz'):
        data = gzip.compress(data, compresslevel=9, mtime=0)
    with atomic_path(path) as temporary, open(temporary, 'wb') as file:
        file.write(data)
