"""Latencies: shipped platforms cover their spaces and follow the published figures; tables are strict."""
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from data.make import latency as fitting
from modules.errors import UserError
from modules.latency import LatencyError, LatencyPredictor, tables
from modules.latency.candidates import space_blocks
from modules.latency.kernel_model import KernelModel, kernels_of
from modules.latency.kernels import Kernel
from modules.latency.predictor import PUBLISHED
from modules.latency.regression import Design, fit_corrections, interpolate_corrections
from modules.modeling.complexity import config_complexity
from modules.search_space.block import Block
from modules.search_space.encoding import EncodingError, parse_sub_stage, subnet_config
from modules.search_space.sampling import sample_subnet
from modules.search_space.superspace import SUPERSPACES

from .conftest import REFERENCE, ROOT, needs_reference

PIXEL4, VNNI = 'tflite27_cpu_int8', 'onnx_lut'
SUPERNETS = {'mobilew': 'mobilew-123456-012321', 'mobile_v1': 'mobile_v1-012341-000000',
             'onnxw': 'onnxw-012345-023231', 'onnx': 'onnx-012341-000000'}
V2 = Block('MobileNetV2ResBlock', 112, 16, 16, 3, 4, 1, 'relu6')


def configs(space, number, seed=0):
    rng, supernet = random.Random(seed), SUPERNETS[space]
    return [subnet_config(supernet, sample_subnet(supernet, rng)) for _ in range(number)]


# Shipped platforms

def test_the_default_platform_of_every_space_is_shipped():
    assert {space.platform for space in SUPERSPACES.values()} == set(PUBLISHED) == set(fitting.RECIPES)


@pytest.mark.parametrize('space', sorted(SUPERSPACES))
def test_every_block_of_a_space_is_predicted(space):
    blocks = space_blocks(space)
    stem_and_head = {'FirstConvBlock', 'FinalExpandBlock', 'FeatureMixBlock', 'LogitsBlock'}
    assert {b.name for b in blocks} >= stem_and_head
    platform = SUPERSPACES[space].platform
    assert all(0 < ms < 1000 for ms in LatencyPredictor(platform).predict_blocks(blocks))
    table, _ = tables.load_platform(os.path.join(tables.DATA, platform))
    ours = 'demo', 'demo_96', 'small', 'mobile_v1_res'           # the others are predicted beforehand
    assert space in ours or all(block in table for block in blocks)


@pytest.mark.parametrize('space', sorted(SUPERNETS))
def test_a_network_is_the_sum_of_its_blocks(space):
    predictor = LatencyPredictor(SUPERSPACES[space].platform)
    for config in configs(space, 20):
        ms = predictor.predict_subnet(config)
        assert type(ms) is float
        assert ms == pytest.approx(sum(predictor.predict_block(*block) for block in config.blocks))


def test_flops_are_a_platform():
    predictor = LatencyPredictor('mflops')
    for config in configs('onnxw', 5):
        assert predictor.predict_subnet(config) == pytest.approx(config_complexity(config.blocks)[0])
    assert (predictor.unit, LatencyPredictor(PIXEL4).unit) == ('MFLOPs', 'ms')


def test_a_sub_stage_is_the_sum_of_its_blocks():
    predictor = LatencyPredictor(PIXEL4)
    ms = predictor.predict_sub_stage('mobilew', 'stage3_5', '5#72#6_3#112#8', (1, 32, 28, 28))
    blocks = [('MobileNetV3K3ResBlock', 28, 32, 72, 5, 6, 2, 'swish'),
              ('MobileNetV3K3ResBlock', 14, 72, 112, 3, 8, 1, 'swish')]
    assert ms == pytest.approx(sum(predictor.predict_block(*block) for block in blocks))
    assert type(ms) is float


@pytest.mark.parametrize('shape', [(1, 32, 28, 14), (32, 28, 28), (1, 32, 0, 0), None])
def test_a_wrong_input_shape_is_refused(shape):
    with pytest.raises(EncodingError, match='stage3_5: input shape .* is not'):
        LatencyPredictor(PIXEL4).predict_sub_stage('mobilew', 'stage3_5', '5#72#6_3#112#8', shape)


def test_a_sub_stage_outside_the_space_is_refused():
    with pytest.raises(EncodingError):
        LatencyPredictor(PIXEL4).predict_sub_stage('mobilew', 'stage3_5', '5#73#6_3#112#8', (1, 32, 28, 28))


def test_no_expand_ratio_may_be_written_as_none_or_zero():
    predictor = LatencyPredictor(VNNI)
    sizes = 'MobileNetV1DualBlock', 14, 128, 144, 3
    assert predictor.predict_block(*sizes, None, 1, 'relu') == predictor.predict_block(*sizes, 0, 1, 'relu')


def test_blocks_outside_the_spaces_follow_those_inside():
    predictor = LatencyPredictor(PIXEL4)
    inside, outside = (predictor.predict_block('MobileNetV2ResBlock', 14, 112, cout, 5, 6, 1, 'relu6')
                       for cout in (144, 148))
    assert 0.9 < outside / inside < 1.2


@pytest.mark.parametrize('space', ['mobilew', 'onnxw'])
def test_ten_thousand_subnets_take_under_two_seconds(space):
    networks = configs(space, 10000)
    start = time.perf_counter()
    predictor = LatencyPredictor(SUPERSPACES[space].platform)
    latencies = [predictor.predict_subnet(config) for config in networks]
    assert time.perf_counter() - start < 2
    assert len(latencies) == 10000 and min(latencies) > 0


@pytest.mark.parametrize('name', ['FirstConvBlock', 'FinalExpandBlock', 'MobileNetV2ResBlock', 'ResNetBlock'])
def test_pixel4_latency_grows_with_the_resolution(name):
    table, _ = tables.load_platform(os.path.join(tables.DATA, PIXEL4))
    series = {}
    for block, ms in table.items():
        if block[0] == name:
            series.setdefault(block[2:], []).append((block[1], ms))
    for points in series.values():
        ms = [value for _, value in sorted(points)]
        assert all(b >= 0.9 * a for a, b in zip(ms, ms[1:]))


def test_an_unknown_block_type_or_activation_is_refused():
    with pytest.raises(LatencyError, match='onnx_lut: block type MobileNetV2Block was not fitted'):
        LatencyPredictor(VNNI).predict_block('MobileNetV2Block', 14, 64, 64, 3, 6, 1, 'relu6')
    with pytest.raises(LatencyError, match="no block type 'Nonsense'"):
        LatencyPredictor(PIXEL4).predict_block('Nonsense', 14, 64, 64, 3, 6, 1, 'relu6')
    with pytest.raises(LatencyError, match='no figures of kernel gelu'):
        LatencyPredictor(PIXEL4).predict_block('MobileNetV2Block', 14, 64, 64, 3, 6, 1, 'gelu')
    with pytest.raises(LatencyError, match='at least 1'):
        LatencyPredictor(PIXEL4).predict_block('MobileNetV2Block', 0, 64, 64, 3, 6, 1, 'relu')


def test_an_unknown_platform_is_refused():
    with pytest.raises(LatencyError, match='no_phone.*onnx_lut, .*tflite27_cpu_int8'):
        LatencyPredictor('no_phone')


def test_prediction_needs_numpy_only():
    code = ('import sys; from modules.latency import LatencyPredictor; '
            "LatencyPredictor('onnx_lut').predict_block('ResNetBlock', 14, 60, 64, 3, 1.0, 1, 'relu'); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'sklearn', 'pandas')))")
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


@needs_reference
@pytest.mark.parametrize('platform', PUBLISHED)
def test_shipped_platforms_follow_the_published_rows(platform):
    recipe, predictor = fitting.RECIPES[platform], LatencyPredictor(platform)
    rows = fitting.read_lut_rows(os.path.join(REFERENCE, 'lut', recipe.lut), recipe.lut)[::10]
    error = np.array([abs(sum(predictor.predict_blocks(blocks)) / ms - 1) for blocks, ms, _ in rows])
    assert np.median(error) <= 0.01
    assert np.mean(error <= 0.1) >= 0.98


@needs_reference
def test_vnni_follows_the_published_blocks():
    figures = list(tables.read_table(os.path.join(REFERENCE, fitting.RECIPES[VNNI].figures)).items())[::10]
    predicted = np.array(LatencyPredictor(VNNI).predict_blocks([block for block, _ in figures]))
    error = np.abs(predicted / [ms for _, ms in figures] - 1)
    assert np.median(error) <= 0.03
    assert np.mean(error <= 0.1) >= 0.90


@needs_reference
def test_pixel4_follows_the_published_kernels():
    _, model = tables.load_platform(os.path.join(tables.DATA, PIXEL4))
    figures = fitting.read_kernels(os.path.join(REFERENCE, fitting.RECIPES[PIXEL4].figures))
    predicted = model.kernel_ms([kernel for kernel, _ in figures])
    assert np.allclose(predicted, [ms for _, ms in figures], rtol=0.1)


# Block tables

KEYS = ['MobileNetV2ResBlock_112_16_16_3_4_1_relu6', 'MobileNetV1DualBlock_14_128_144_5_0_2_relu',
        'ResNetBlock_112_16_16_3_0.5_1_relu', 'ResNetSEBlock_14_16_16_7_1.0_2_relu',
        'FirstConvBlock_224_3_16_3_None_2_relu', 'LogitsBlock_1_1920_1000_0_None_0_relu',
        'FusedMBConvResBlock_28_48_80_3_3_2_swish']


@pytest.mark.parametrize('key', KEYS)
def test_keys_round_trip(key):
    assert tables.format_key(tables.parse_key(key)) == key


@needs_reference
def test_every_published_key_round_trips():
    for block in tables.read_table(os.path.join(REFERENCE, fitting.RECIPES[VNNI].figures)):
        assert tables.parse_key(tables.format_key(block)) == block


@pytest.fixture
def table(tmp_path):
    """A table of a host that is 3 times slower than the shipped one: every third block of the onnx space."""
    predictor = LatencyPredictor(VNNI)
    blocks = space_blocks('onnx')[::3]
    path = tmp_path / 'my_host.json'
    tables.write_table(path, dict(zip(blocks, (3 * ms for ms in predictor.predict_blocks(blocks)))))
    return path, blocks


def test_a_table_predicts_its_blocks(table):
    path, blocks = table
    predictor, shipped = LatencyPredictor(path), LatencyPredictor(VNNI)
    assert predictor.predict_block(*blocks[5]) == pytest.approx(3 * shipped.predict_block(*blocks[5]))


def test_a_missing_key_is_named(table):
    path, blocks = table
    missing = Block('FusedMBConvResBlock', 28, 48, 80, 3, 3, 2, 'swish')
    with pytest.raises(LatencyError, match='my_host.json: no latency of FusedMBConvResBlock_28_48_80_3_3_2'):
        LatencyPredictor(path).predict_block(*missing)
    with pytest.raises(LatencyError, match='of ResNetBlock_14_12_64_3_0.5_1_relu; .*import_lut.py'):
        LatencyPredictor(path).predict_block('ResNetBlock', 14, 12, 64, 3, 0.5, 1, 'relu')


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(LatencyError, match='none.json: No such file'):
        LatencyPredictor(tmp_path / 'none.json')


def test_a_table_may_have_blocks_of_any_name(tmp_path):
    path = tmp_path / 'table.json'
    path.write_text('{"MyBlock_14_16_16_3_None_1_relu": 1.5}')
    assert LatencyPredictor(path).predict_block('MyBlock', 14, 16, 16, 3, None, 1, 'relu') == 1.5


# Fitting

def constant_model():
    """A plain sum of kernels with a constant rate each."""
    rates = {'conv-bn-relu': 1e-7, 'dwconv-bn-relu': 2e-7, 'add': 1e-6}
    return KernelModel('toy', {name: [(np.zeros((9, 1)), np.array([math.log(rate)]))]
                               for name, rate in rates.items()}, False)


def test_a_block_is_the_sum_of_its_kernels():
    model = constant_model()
    work = {'conv-bn-relu': 112 ** 2 * 16 * 64 * 2, 'dwconv-bn-relu': 112 ** 2 * 64 * 9, 'add': 112 ** 2 * 16}
    rates = {'conv-bn-relu': 1e-7, 'dwconv-bn-relu': 2e-7, 'add': 1e-6}
    expected = sum(work[kernel] * rate for kernel, rate in rates.items())
    assert model.predict_blocks([V2, V2]) == pytest.approx([expected] * 2)
    assert len(model.predict_blocks([])) == 0


def test_corrections_are_found_through_sums():
    rng = np.random.default_rng(0)
    blocks = [V2._replace(cin=c, cout=d) for c in (16, 24, 32, 40) for d in (16, 24, 32, 40)]
    truth, model = constant_model(), constant_model()
    kernels = sorted({kernel for block in blocks for kernel in kernels_of(block)})
    truth.corrections = dict(zip(kernels, rng.normal(0, 0.1, len(kernels))))
    design = Design([[blocks[i] for i in rng.choice(16, 3)] for _ in range(200)])
    ms = design.predict(truth)
    assert np.median(np.abs(design.predict(model) / ms - 1)) > 0.01
    model.corrections = fit_corrections(model, design, ms, np.arange(100), prior=0.1, noise=1e-4)
    assert np.abs(design.predict(model) / ms - 1)[100:].max() < 0.005


def test_corrections_between_resolutions():
    kernel = Kernel('conv-bn-relu', 24, 16, 32, 3, 2)
    found = interpolate_corrections({kernel: 0.1, kernel._replace(hw=28): 0.3},
                                    [kernel._replace(hw=hw) for hw in (20, 23, 24, 26, 30)])
    assert found == {kernel._replace(hw=23): 0.1, kernel._replace(hw=26): pytest.approx(0.2)}


def test_fitting_writes_a_platform_that_can_be_used(tmp_path, monkeypatch):
    """The whole of data/make/latency.py on a handful of made-up figures."""
    recipe = dataclasses.replace(fitting.RECIPES[PIXEL4], rows_per_epoch=512, spaces=('mobile_v1',))
    monkeypatch.setitem(fitting.RECIPES, PIXEL4, recipe)
    predictor, space = LatencyPredictor(PIXEL4), SUPERSPACES['mobilew']
    folder = tmp_path / 'reference' / 'lut' / 'mobilew'
    folder.mkdir(parents=True)
    for lut_id in space.lut_ids():
        stage, digit, window = lut_id.split('_')
        widths = space.stage(stage).window_widths(int(window))
        block_type, cin = space.block_type(stage, int(digit)), space.input_widths(stage)[0]
        sub_stage = '_'.join(f'{k}#{widths[-1]}#{block_type.expands[0]}' for k in block_type.kernels[:2])
        shape = 1, cin, 224 // space.input_stride(stage), 224 // space.input_stride(stage)
        parse_sub_stage(space, f'{stage}_{digit}', sub_stage)
        ms = predictor.predict_sub_stage(space, f'{stage}_{digit}', sub_stage, shape)
        row = sub_stage, 'x'.join(map(str, shape)), '0.3', '1.0', '1.0', f'{ms:.4f}'
        (folder / f'{lut_id}.csv').write_text(','.join(row) + '\n')
    (tmp_path / 'reference' / 'latency').mkdir()
    (tmp_path / 'reference' / recipe.figures).write_text(
        'kernel,hw,cin,cout,kernel_size,stride,ms\nhswish,112,16,,,,0.5\nfc,,1280,1000,,,0.25\n'
        'global-avgpool,1,1280,,,,0.18\n')
    monkeypatch.setattr(sys, 'argv', [
        'fitting', '--reference', str(tmp_path / 'reference'), '--platform', PIXEL4,
        '--output', str(tmp_path), '--epochs', '2', '--skip_scores'])
    fitting.main(fitting.get_args())
    assert sorted(os.listdir(tmp_path / PIXEL4)) == ['blocks.npz', 'model.npz']
    monkeypatch.setattr('modules.latency.predictor.DATA', str(tmp_path))
    fitted = LatencyPredictor(PIXEL4)
    for config in configs('mobile_v1', 5):
        assert 0.2 < fitted.predict_subnet(config) / predictor.predict_subnet(config) < 5
    (folder / 'stage3_1_0.csv').write_text('5#72#3,1x40x28x28,0.3,1,1\n')
    with pytest.raises(UserError, match='stage3_1_0.csv:1: 5 columns'):
        fitting.main(fitting.get_args())


def test_a_broken_platform_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('modules.latency.predictor.DATA', str(tmp_path))
    (tmp_path / 'mine').mkdir()
    with pytest.raises(LatencyError, match='mine: not a fitted latency platform'):
        LatencyPredictor('mine')


def test_shipped_files_are_small_and_plain():
    for platform in PUBLISHED:
        folder = os.path.join(tables.DATA, platform)
        assert sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)) < 3e6
        for name in ('blocks.npz', 'model.npz'):
            with np.load(os.path.join(folder, name), allow_pickle=False) as data:
                assert all(data[key].dtype != object for key in data)
        with np.load(os.path.join(folder, 'model.npz')) as data:
            assert json.loads(str(data['header']))['layers']
