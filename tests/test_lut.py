"""Block LUTs: the format both ways, refusals with file and line, the shipped files."""
import os
import random

import numpy as np
import pytest

from modules import ROOT
from modules.block_kd.lut import (
    LutError,
    LutRow,
    format_row,
    lut_files,
    lut_resolutions,
    read_block_lut,
    read_luts,
    read_rows,
    resolutions_of,
    write_block_lut,
)
from modules.modeling.complexity import config_complexity
from modules.search_space.encoding import format_sub_stage, sub_stage_blocks
from modules.search_space.sampling import sample_sub_stage
from modules.search_space.superspace import get_superspace

from .conftest import REFERENCE, needs_reference

SHIPPED = os.path.join(ROOT, 'data', 'block_lut')
PUBLISHED = os.path.join(REFERENCE, 'lut')
GOOD = '5#96#8_5#128#8,1x48x20x20,0.2704,80.0384,0.7599,1.7129\n'


def make_lut(path, superspace, lut_id, count=30, resolutions=(160, 192, 224), seed=0):
    """A small LUT file with random losses and latencies."""
    space, rng = get_superspace(superspace), random.Random(f'{seed} {lut_id}')
    stride = space.input_stride(lut_id.split('_')[0])
    rows = []
    for i in range(count):
        blocks, cin, _ = sample_sub_stage(space, lut_id, rng)
        hw = -(-resolutions[i % len(resolutions)] // stride)
        blocks = sub_stage_blocks(space, lut_id, format_sub_stage(blocks), (1, cin, hw, hw))
        rows.append(LutRow(blocks, rng.uniform(0.2, 0.5), rng.uniform(10, 90), rng.uniform(0.1, 0.9),
                           rng.uniform(0.5, 4)))
    write_block_lut(str(path), rows)
    return rows


@pytest.mark.parametrize('suffix', ['.csv', '.csv.gz'])
def test_write_then_read(tmp_path, suffix):
    path = str(tmp_path / f'stage3_1_2{suffix}')
    rows = make_lut(path, 'onnxw', 'stage3_1_2')
    lut = read_block_lut(path, 'onnxw', 'stage3_1_2')
    assert [row.blocks for row in read_rows(path, 'onnxw', 'stage3_1_2')] == [row.blocks for row in rows]
    assert lut.hw.tolist() == [row.hw for row in rows]
    for name in ('loss', 'flops', 'params', 'latency'):
        np.testing.assert_allclose(getattr(lut, name), [getattr(row, name) for row in rows], atol=5.1e-5)
    with open(path, 'rb') as file:
        first = file.read()
    make_lut(path, 'onnxw', 'stage3_1_2')
    with open(path, 'rb') as file:
        assert file.read() == first
    assert os.listdir(tmp_path) == [os.path.basename(path)]


def test_a_row_is_printed_as_published(tmp_path):
    path = tmp_path / 'stage3_1_2.csv'
    path.write_text(GOOD.replace('\n', '\r\n'))
    row, = read_rows(str(path), 'onnxw', 'stage3_1_2')
    assert format_row(row) + '\n' == GOOD


@pytest.mark.parametrize('row, reason', [
    ('5#96#8_5#128#8,1x48x20x20,0.2704,80.0384,0.7599', '5 columns'),
    ('5#96#8_5#128#8,1x48x20x20,0.2704,80.0384,0.7599,1.7,2', '7 columns'),
    ('', 'empty line'),
    ('sub-stage,shape,loss,flops,params,latency', 'input shape'),
    ('5#96#8_5#128#8,1x48x20x24,0.2704,80.0384,0.7599,1.7129', "input shape '1x48x20x24'"),
    ('5#96#8_5#128#8,2x48x20x20,0.2704,80.0384,0.7599,1.7129', "input shape '2x48x20x20'"),
    ('5#96#8_5#128#8,1x40x20x20,0.2704,80.0384,0.7599,1.7129', 'input width 40'),
    ('5#96#8_5#128#8,1x48x23x23,0.2704,80.0384,0.7599,1.7129', '23 pixels'),
    ('5#96#8_5#128#8,1x48x0x0,0.2704,80.0384,0.7599,1.7129', 'input shape'),
    ('5#96#8_5#128#8,1x48x20x20,nan,80.0384,0.7599,1.7129', "NSR loss 'nan'"),
    ('5#96#8_5#128#8,1x48x20x20,-0.1,80.0384,0.7599,1.7129', "NSR loss '-0.1'"),
    ('5#96#8_5#128#8,1x48x20x20,0.2,80.0384,0.7599,0.0000', 'latency (ms) 0'),
    ('5#96#8_5#128#8,1x48x20x20,0.2,80.0384,0.7599,1e999', 'latency (ms) inf'),
    ('7#96#8_5#128#8,1x48x20x20,0.2704,80.0384,0.7599,1.7129', 'kernel 7'),
    ('5#64#8_5#128#8,1x48x20x20,0.2704,80.0384,0.7599,1.7129', 'width 64'),
    ('5#96#3_5#128#8,1x48x20x20,0.2704,80.0384,0.7599,1.7129', 'expand ratio 3'),
    ('5#96#8,1x48x20x20,0.2704,80.0384,0.7599,1.7129', 'depth 1'),
    ('5#96#8_5#128#ü,1x48x20x20,0.2704,80.0384,0.7599,1.7129', 'not plain text'),
    ('x', '1 columns'),
    ('"5#96#8_5#128#8","1x48x20x20",0.2704,80.0384,0.7599,1.7129', 'input shape'),
    ('5#96#8_5#128#8;1x48x20x20;0.2704;80.0384;0.7599;1.7129', '1 columns'),
    ('5#96#8_5#128#8,1x48x20x20,0.2704,80.0384,0.7599,1.7129\0', 'latency (ms)'),
    ('5#96#8_5#128#8,1x48x20x20,0.2704,80.0384,0.7599,inf', "latency (ms) 'inf'"),
    ('5#96#8_5#128#8,1x48x999999x999999,0.2704,80.0384,0.7599,1.7129', '999999'),
    ('_'.join(['5#96#8'] * 9) + ',1x48x20x20,0.2704,80.0384,0.7599,1.7129', 'depth 9'),
])
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, row, reason):
    path = tmp_path / 'stage3_1_2.csv'
    path.write_text(GOOD * 2 + row + '\n' + GOOD, encoding='utf-8')
    with pytest.raises(LutError) as error:
        read_block_lut(str(path), 'onnxw', 'stage3_1_2')
    assert str(error.value).startswith(f'{path}:3: ') and reason in str(error.value)
    assert '\n' not in str(error.value)


def test_a_cut_last_row_is_refused_and_a_whole_one_without_line_end_is_not(tmp_path):
    path = tmp_path / 'stage3_1_2.csv'
    path.write_text(GOOD * 2 + GOOD.rstrip('\n')[:-2])
    with pytest.raises(LutError, match=r'stage3_1_2.csv:3: .*cut off'):
        read_block_lut(path, 'onnxw', 'stage3_1_2')
    path.write_text((GOOD * 2).rstrip('\n'))
    assert len(read_block_lut(path, 'onnxw', 'stage3_1_2')) == 2


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / 'stage3_1_2.csv.gz'
    make_lut(path, 'onnxw', 'stage3_1_2')
    data = path.read_bytes()
    for broken in (data[:-20], GOOD.encode(), b'', data[:50] + b'xxxx' + data[54:]):
        path.write_bytes(broken)
        with pytest.raises(LutError, match='stage3_1_2.csv.gz'):
            read_block_lut(str(path), 'onnxw', 'stage3_1_2')
    with pytest.raises(LutError, match='No such file'):
        read_block_lut(str(tmp_path / 'stage3_1_3.csv'), 'onnxw', 'stage3_1_3')


def test_missing_files_are_listed(tmp_path):
    for lut_id in get_superspace('onnx').lut_ids():
        make_lut(tmp_path / 'onnx' / f'{lut_id}.csv', 'onnx', lut_id, count=3)
    assert len(lut_files(str(tmp_path), 'onnx')) == 30
    assert lut_files(str(tmp_path / 'onnx'), 'onnx') == lut_files(str(tmp_path), 'onnx')
    os.remove(tmp_path / 'onnx' / 'stage2_3_0.csv')
    os.remove(tmp_path / 'onnx' / 'stage6_0_0.csv')
    with pytest.raises(LutError, match='2 of 30 .*: stage2_3_0 stage6_0_0$'):
        read_luts(str(tmp_path), 'onnx')
    assert list(read_luts(str(tmp_path), 'onnx', ['stage1_0_0'])) == ['stage1_0_0']
    with pytest.raises(LutError, match='no block LUTs of onnxw'):
        lut_files(str(tmp_path / 'nowhere'), 'onnxw')
    make_lut(tmp_path / 'onnx' / 'stage1_0_0.csv.gz', 'onnx', 'stage1_0_0', count=3)
    with pytest.raises(LutError, match='stage1_0_0.csv.gz exist'):
        lut_files(str(tmp_path), 'onnx')


def test_resolutions(tmp_path):
    assert list(resolutions_of(80, 2)) == [160] and list(resolutions_of(6, 32)) == [176, 192]
    assert list(resolutions_of(81, 2)) == []
    for lut_id in ('stage1_0_0', 'stage3_0_0', 'stage6_0_0'):
        make_lut(tmp_path / f'{lut_id}.csv', 'onnx', lut_id, resolutions=(160, 176, 192))
    luts = read_luts(str(tmp_path), 'onnx', ['stage1_0_0', 'stage3_0_0', 'stage6_0_0'])
    assert lut_resolutions(luts, 'onnx') == (160, 176, 192)
    make_lut(tmp_path / 'stage3_0_0.csv', 'onnx', 'stage3_0_0', resolutions=(160, 192))
    luts = read_luts(str(tmp_path), 'onnx', ['stage1_0_0', 'stage3_0_0'])
    with pytest.raises(LutError, match=r'stage3_0_0.csv: no row of resolution 176 .*stage1_0_0.csv:2 has'):
        lut_resolutions(luts, 'onnx')
    make_lut(tmp_path / 'stage3_0_0.csv', 'onnx', 'stage3_0_0', resolutions=(160, 176, 192, 224))
    luts = read_luts(str(tmp_path), 'onnx', ['stage1_0_0', 'stage3_0_0'])
    with pytest.raises(LutError, match=r'stage3_0_0.csv:4: input of 28 pixels'):
        lut_resolutions(luts, 'onnx')


@pytest.mark.parametrize('superspace', ['mobilew', 'onnxw'])
def test_shipped_luts(superspace):
    space = get_superspace(superspace)
    files = lut_files(SHIPPED, space)
    assert len(files) == len(space.lut_ids())
    for lut_id in random.Random(0).sample(sorted(files), 8):
        rows = list(read_rows(files[lut_id], space, lut_id))
        assert len(rows) == 1000 and min(row.loss for row in rows) > 0.05 and max(row.loss for row in rows) < 1.3
        for row in rows[::100]:
            np.testing.assert_allclose((row.flops, row.params), config_complexity(row.blocks), atol=5.1e-5)


@needs_reference
def test_published_luts_are_read():
    lut = read_block_lut(lut_files(PUBLISHED, 'mobilew')['stage3_5_4'], 'mobilew', 'stage3_5_4')
    assert len(lut) >= 600
    luts = read_luts(PUBLISHED, 'mobilew', ['stage1_0_0', 'stage6_6_3'])
    assert lut_resolutions(luts, 'mobilew') == (160, 192, 224)


def test_the_fitted_losses_keep_the_scatter():
    pytest.importorskip('sklearn')
    from data.make.block_lut import NsrModel
    rng = np.random.default_rng(0)

    def draw(count):
        rows = rng.uniform(1, 2, (count, 4))
        return rows, rows @ [0.1, 0.2, 0, 0.1] + 0.03 * rows[:, 0] * rng.standard_normal(count)

    model = NsrModel(*draw(400))
    rows, loss = draw(400)
    made = model.sample(rows, np.random.default_rng(1))
    assert abs(made.std() / loss.std() - 1) < 0.15
    assert abs(made.mean() - loss.mean()) < 0.01
    np.testing.assert_allclose(np.sort(made)[[4, 20, -20]], np.sort(loss)[[4, 20, -20]], atol=0.06)
    np.testing.assert_array_equal(made, model.sample(rows, np.random.default_rng(1)))
