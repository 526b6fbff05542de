"""nn-Meter's registered kernel predictors: the real package trains, registers and predicts; we must agree.

Those marked `needs_nn_meter` run where requirements-nn-meter.txt is installed. HOME is a temporary folder.
"""
import importlib.util
import json
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from modules.latency import LatencyError, LatencyPredictor, nn_meter_adapter
from modules.latency.kernels import Kernel, block_kernels
from modules.modeling.layout import block_layout
from modules.search_space.block import Block, out_size
from modules.search_space.encoding import subnet_config
from modules.search_space.sampling import max_subnet, min_subnet, sample_subnet

needs_nn_meter = pytest.mark.skipif(importlib.util.find_spec('nn_meter') is None,
                                    reason='pip install -r requirements-nn-meter.txt')
SUPERNETS = ('mobilew-123456-012321', 'onnxw-012345-012321', 'mobile_original-012340-000000')
KERNELS = ['conv-bn-relu', 'dwconv-bn-relu', 'fc', 'global-avgpool',
           'hswish', 'swish', 'se', 'add', 'addrelu']
FUSION_RULES = {f'BF_{rule}': {'latency': {}, 'obey': True}
                for rule in ('conv_bn', 'conv_relu', 'dwconv_bn', 'dwconv_relu', 'bn_relu', 'add_relu')}


def configs(supernets, count=2):
    """SubnetConfigs of the largest, the smallest and `count` random subnets of each supernet."""
    rng = random.Random(0)
    return [subnet_config(s, subnet) for s in supernets
            for subnet in (max_subnet(s), min_subnet(s), *(sample_subnet(s, rng) for _ in range(count)))]


def kernels_of(config):
    return [k for block in config.blocks for k in block_kernels(block)]


def nn_meter_features(kernel):
    """A kernel's features as nn-Meter's builder makes them to train a predictor (swish as it does hswish)."""
    from nn_meter.builder.kernel_predictor_builder.predictor_builder.extract_feature import get_feature_parser
    name = 'hswish' if kernel.name == 'swish' else kernel.name
    return get_feature_parser(name).get_feature_by_config({
        'HW': kernel.hw, 'CIN': kernel.cin, 'COUT': kernel.cout, 'KERNEL_SIZE': kernel.kernel_size,
        'STRIDES': kernel.stride})


def nn_meter(home, *args):
    """Output of the `nn-meter` command with HOME `home`."""
    done = subprocess.run([Path(sys.executable).with_name('nn-meter'), *map(str, args)], text=True,
                          env={**os.environ, 'HOME': str(home)}, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def register(home, folder, name, kernels=KERNELS, version=1.0):
    """`nn-meter register --predictor meta.yaml` of the pickles in `folder`."""
    meta = Path(home, 'meta.yaml')
    meta.write_text(yaml.dump({'name': name, 'version': version, 'category': 'cpu',
                               'package_location': str(folder), 'kernel_predictors': list(kernels)}))
    assert f'Successfully register predictor: {name}' in nn_meter(home, 'register', '--predictor', meta)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A HOME where predictors of `my_phone`, trained on made-up latencies, are registered with nn-Meter."""
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter('ignore')         # nn-Meter imports the deprecated pkg_resources
        patch.setenv('HOME', str(home))
        import nn_meter as package
        assert package.__version__ == '2.0'
        from sklearn.ensemble import RandomForestRegressor
        folder = home / 'my phone'
        folder.mkdir()
        kernels = {kernel for config in configs(SUPERNETS, 8) for kernel in kernels_of(config)}
        kernels = sorted(kernels | {Kernel('global-avgpool', 1, c, c) for c in (640, 1280)})
        assert {kernel.name for kernel in kernels} == set(KERNELS)
        for name in KERNELS:
            features = np.array([nn_meter_features(kernel) for kernel in kernels if kernel.name == name])
            model = RandomForestRegressor(n_estimators=5, random_state=0)
            model.fit(features, 0.1 + features.prod(axis=1) ** 0.3)
            Path(folder, f'{name}.pkl').write_bytes(pickle.dumps(model))
        Path(folder, 'fusion_rules.json').write_text(json.dumps(FUSION_RULES))
        register(home, folder, 'my_phone')
        yield home


@needs_nn_meter
def test_features_are_those_of_nn_meter(home):
    for kernel in {kernel for config in configs(SUPERNETS) for kernel in kernels_of(config)}:
        assert kernel.features() == nn_meter_features(kernel), kernel
    odd = Kernel('conv-bn-relu', 7, 8, 16, 3, 2)
    assert odd.features() == nn_meter_features(odd) == [7, 8, 16, 3, 2, 0.014308, 0.001168]


@needs_nn_meter
@pytest.mark.parametrize('supernet', SUPERNETS)
def test_a_subnet_is_the_sum_of_nn_meters_kernels(home, supernet):
    from nn_meter.predictor.prediction.predict_by_kernel import predict_model
    predictor = nn_meter_adapter.load('my_phone', trust_pickles=True)
    for config in configs([supernet]):
        kernels = kernels_of(config)
        theirs = predict_model({i: {k.name: k.features()} for i, k in enumerate(kernels)}, predictor.models)
        blocks = predictor.predict_blocks(config.blocks)
        assert blocks.shape == (len(config.blocks),)
        assert blocks.sum() == pytest.approx(theirs, rel=1e-12)
        latency = LatencyPredictor('my_phone', trust_pickles=True)
        assert latency.predict_block(*config.blocks[3]) == pytest.approx(blocks[3], rel=1e-12)
        assert latency.predict_subnet(config) == pytest.approx(theirs, rel=1e-12)


@needs_nn_meter
def test_nn_meter_predicts_the_same_from_the_networks_graph(home, tmp_path):
    """`nn-meter predict` finds a graph's kernels itself, but counts no swish and takes a pool's hw as 1."""
    predictor = nn_meter_adapter.load('my_phone', trust_pickles=True)
    for i, config in enumerate(configs(SUPERNETS, 1)):
        Path(tmp_path, f'{i}.json').write_text(json.dumps(nn_meter_graph(config)))
    output = nn_meter(home, 'predict', '--predictor', 'my_phone', '--nn-meter-ir', tmp_path)
    for i, config in enumerate(configs(SUPERNETS, 1)):
        theirs = float(re.search(rf'predict latency for {i}.json: ([0-9.]+) ms', output)[1])
        kernels = kernels_of(config)
        pool, = [kernel for kernel in kernels if kernel.name == 'global-avgpool']
        as_ours, as_theirs = predictor.models['global-avgpool'].predict([pool.features(), [1, pool.cin]])
        assert pool.hw > 1 and as_ours != as_theirs
        swish = [kernel.features() for kernel in kernels if kernel.name == 'swish']
        missing = predictor.models['swish'].predict(swish).sum() if swish else 0
        ours = predictor.predict_blocks(config.blocks).sum()
        assert ours - as_ours + as_theirs - missing == pytest.approx(theirs, rel=1e-9)


def nn_meter_graph(config):
    """The network in nn-Meter's IR: {node: {attr: {type, attr, input_shape, output_shape}, inbounds, …}}."""
    graph, image = {}, [1, config.resolution, config.resolution, 3]

    def node(kind, inputs, shape, **attr):
        name = f'{len(graph)}_{kind}'
        shapes = [graph[i]['attr']['output_shape'][0] for i in inputs] or [image]
        graph[name] = {'attr': {'type': kind, 'attr': attr, 'input_shape': shapes, 'output_shape': [shape]},
                       'inbounds': list(inputs), 'outbounds': []}
        for i in inputs:
            graph[i]['outbounds'].append(name)
        return [name]

    tip = []
    for block in config.blocks:
        start, start_hw, hw, shortcut = tip, block.hw, block.hw, None
        for layer in block_layout(block):
            at, size = (start, start_hw) if layer.shortcut else (tip, hw)
            size = 1 if layer.op in ('mean', 'linear') else out_size(size, layer.stride)
            shape = [1, size, size, layer.cout]
            if layer.op in ('conv', 'dwconv', 'dwstack'):
                group = {} if layer.op == 'conv' else {'group': layer.cin}
                for i in range(layer.repeat):
                    strides = [layer.stride if i == 0 else 1] * 2
                    at = node('Conv', at, shape, kernel_shape=[layer.kernel] * 2, strides=strides, **group)
                at = node('BatchNormalization', at, shape)
            elif layer.op == 'add':
                at = node('Add', [*at, *(shortcut or start)], shape)
            elif layer.op in ('se', 'mean', 'linear'):
                kind = {'se': 'se', 'mean': 'GlobalAveragePool', 'linear': 'Gemm'}[layer.op]
                at = node(kind, at, [1, layer.cout] if layer.op == 'linear' else shape)
            if layer.activation:
                kind = {'relu': 'Relu', 'relu6': 'Clip'}.get(layer.activation, layer.activation)
                at = node(kind, at, shape)
            if layer.shortcut:
                shortcut = at
            else:
                tip, hw = at, size
    return graph


@needs_nn_meter
def test_addrelu_falls_back_to_add_and_relu_and_nothing_else(home, tmp_path):
    config = configs(['mobilew-333333-000000'], 0)[0]
    full = nn_meter_adapter.load('my_phone', trust_pickles=True)
    models = {name: model for name, model in full.models.items() if name != 'addrelu'}

    def predict(models):
        predictor = nn_meter_adapter.NNMeterPredictor('my_phone', tmp_path, models)
        return predictor.predict_blocks(config.blocks).sum()

    relu = {**models, 'relu': models['hswish']}
    kernels = kernels_of(config)
    unfused = [k._replace(name=name) for k in kernels for name in
               (('add', 'relu') if k.name == 'addrelu' else (k.name,))]
    assert predict(relu) == pytest.approx(sum(relu[k.name].predict([k.features()])[0] for k in unfused))
    with pytest.raises(LatencyError, match='ResNetBlock: no predictor of kernel addrelu in .*: add conv'):
        predict(models)
    with pytest.raises(LatencyError, match='no predictor of kernel swish'):
        predict({name: model for name, model in relu.items() if name != 'swish'})


@needs_nn_meter
def test_registry_of_the_real_nn_meter(home, tmp_path):
    folder = home / 'my phone'
    register(home, folder, 'two_versions', KERNELS, 10.0)
    register(home, tmp_path, 'two_versions', (), 9.0)
    assert nn_meter_adapter.load('two_versions', trust_pickles=True).folder == folder
    with pytest.raises(LatencyError, match='^cortexA76cpu_tflite21: built into nn-Meter, which downloads it'):
        nn_meter_adapter.load('cortexA76cpu_tflite21', trust_pickles=True)
    with pytest.raises(LatencyError, match='^no_phone: no such platform; there are .*onnx_lut .*two_versions, '):
        nn_meter_adapter.load('no_phone', trust_pickles=True)


class Canary:
    """Its pickle makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def written_registry(tmp_path, monkeypatch):
    """A folder of kernel predictors in a registry such as `nn-meter register` writes."""
    monkeypatch.setenv('HOME', str(tmp_path))
    registry = tmp_path / '.nn_meter' / 'config' / 'predictors.yaml'
    registry.parent.mkdir(parents=True)
    folder = tmp_path / 'kernels'
    folder.mkdir()
    registry.write_text(yaml.dump([{'name': 'my_phone', 'version': 1.0, 'category': 'cpu',
                                    'package_location': str(folder), 'kernel_predictors': ['fc']}]))
    return folder, registry


def test_no_pickle_is_opened_without_the_flag(written_registry, tmp_path):
    folder, _ = written_registry
    Path(folder, 'fc.pkl').write_bytes(pickle.dumps(Canary(tmp_path / 'opened')))
    with pytest.raises(LatencyError, match='--trust_pickles') as error:
        nn_meter_adapter.load('my_phone')
    assert str(folder) in str(error.value) and '\n' not in str(error.value)
    with pytest.raises(LatencyError, match='--trust_pickles'):
        LatencyPredictor('my_phone')
    assert not (tmp_path / 'opened').exists()
    with pytest.raises(LatencyError, match='fc.pkl: holds a NoneType, not a kernel predictor'):
        nn_meter_adapter.load('my_phone', trust_pickles=True)
    assert (tmp_path / 'opened').exists()       # the canary works


def test_blocks_that_do_not_exist_are_one_line(tmp_path):
    predictor = nn_meter_adapter.NNMeterPredictor('my_phone', tmp_path, {})
    with pytest.raises(LatencyError, match='^my_phone: NoBlock 14 8 8 3 None 1 relu: no block type'):
        predictor.predict_blocks([Block('NoBlock', 14, 8, 8)])
    with pytest.raises(LatencyError, match='^my_phone: MobileNetV2Block 14 8 8 3 None 1 relu: '):
        predictor.predict_blocks([Block('MobileNetV2Block', 14, 8, 8)])
    assert predictor.predict_blocks([]).shape == (0,)


def test_missing_and_damaged_files_are_one_line(written_registry):
    folder, registry = written_registry
    with pytest.raises(LatencyError, match=r'kernels has no fc\.pkl$'):
        nn_meter_adapter.load('my_phone', trust_pickles=True)
    Path(folder, 'fc.pkl').write_bytes(b'cno_such_package.models\nForest\n.')
    with pytest.raises(LatencyError, match='fc.pkl: opening it needs the package no_such_package: pip'):
        nn_meter_adapter.load('my_phone', trust_pickles=True)
    Path(folder, 'fc.pkl').write_bytes(b'not a pickle')
    with pytest.raises(LatencyError, match='fc.pkl: cannot be opened: .+'):
        nn_meter_adapter.load('my_phone', trust_pickles=True)
    for text in ('a: [', 'a: 1', '- 1'):
        registry.write_text(text)
        with pytest.raises(LatencyError, match=re.escape(f'{registry}: ')) as error:
            nn_meter_adapter.load('my_phone')
        assert '\n' not in str(error.value)
    registry.unlink()
    with pytest.raises(LatencyError, match='no such platform; there are .*pip install -r requirements-nn-meter.txt'):
        nn_meter_adapter.load('my_phone')
