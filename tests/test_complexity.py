"""FLOPs and params against the published LUT rows and against torch's own count."""
import csv
import glob
import os
import random

import pytest
import torch

from modules.modeling.blocks import UNITS
from modules.modeling.complexity import network_complexity, sub_stage_complexity
from modules.modeling.layout import LAYOUTS, block_layout, div8
from modules.modeling.network import Network
from modules.modeling.ops.op import QConv
from modules.search_space import sampling
from modules.search_space.block import Block
from modules.search_space.superspace import SUPERSPACES
from modules.zoo import get_subnet, named_subnets

from .conftest import REFERENCE, needs_reference


@needs_reference
def test_published_lut_rows_are_reproduced():
    """All 205,200 rows, which are printed with 4 decimals, to a relative 2e-6 (their sums are float32)."""
    rows = 0
    for path in glob.glob(os.path.join(REFERENCE, 'lut', '*', '*.csv')):
        superspace, lut_id = path.split(os.sep)[-2], os.path.basename(path)[:-4]
        with open(path, newline='', encoding='utf-8') as f:
            for sub_stage, shape, _, flops, params, _ in csv.reader(f):
                shape = tuple(map(int, shape.split('x')))
                for got, published in zip(sub_stage_complexity(superspace, lut_id, sub_stage, shape),
                                          (float(flops), float(params))):
                    assert abs(got - published) <= 5.01e-5 + 2e-6 * published, (path, sub_stage, shape)
                rows += 1
    assert rows == 205_200


def _count(network, image):
    """Multiply-adds of the convolutions and number of parameters, counted while torch runs."""
    macs = 0

    def hook(module, inputs, output):
        nonlocal macs
        macs += module.weight[0].numel() * output.numel()

    hooks = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, QConv)]
    network.eval()
    with torch.no_grad():
        network(image)
    for h in hooks:
        h.remove()
    return macs / 1e6, sum(p.numel() for p in network.parameters()) / 1e6


@pytest.mark.parametrize('superspace', sorted(SUPERSPACES))
def test_complexity_is_what_torch_runs(superspace):
    rng = random.Random(1)
    for _ in range(2):
        supernet = sampling.sample_supernet(superspace, rng)
        network = Network.build(supernet, sampling.sample_subnet(supernet, rng))
        assert network_complexity(network) == pytest.approx(_count(network, torch.zeros(1, 3, 64, 64)), rel=1e-9)


def test_named_networks_have_sensible_sizes():
    sizes = {name: network_complexity(get_subnet(name)) for name in named_subnets()}
    for family in ('pixel4', 'vnni'):
        flops = [sizes[f'SEQnet@{family}-A{i}'][0] for i in range(5)]
        assert flops == sorted(flops) and 50 < flops[0] < 400 and flops[-1] < 3000


@pytest.mark.parametrize('value, expected', [(1, 8), (4, 8), (11, 16), (12, 16), (20, 24), (36, 40), (16, 16),
                                             (18, 24), (124, 128), (27, 32)])
def test_div8_rounds_halves_up_and_never_loses_a_tenth(value, expected):
    assert div8(value) == expected and expected >= 0.9 * value


@pytest.mark.parametrize('name', sorted(LAYOUTS))
def test_layouts_connect(name):
    """Each layer reads what the layer before it writes; the full layout holds every layer any size needs."""
    for cin, cout, stride, expand in ((16, 32, 2, 3), (32, 32, 1, 1), (32, 32, 1, 4), (24, 32, 1, 0.5)):
        block = Block(name, 0, cin, cout, 5, expand, stride)
        layers = block_layout(block)
        channels = cin
        for layer in layers:
            if layer.shortcut:
                assert (layer.cin, layer.cout) == (cin, cout)
                continue
            assert layer.cin == channels
            channels = layer.cout
            assert layer.op == 'add' or layer.op in UNITS
        assert channels == (cout if name != 'LogitsBlock' else layers[-1].cout)
        full = [layer.name for layer in block_layout(block, full=True)]
        assert {layer.name for layer in layers} <= set(full)


def test_unknown_block_type_is_named():
    with pytest.raises(ValueError, match="no block type 'MobileNetV9Block'"):
        block_layout(Block('MobileNetV9Block', 0, 8, 8))
