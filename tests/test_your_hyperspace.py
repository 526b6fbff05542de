"""docs/your_hyperspace.md is true: its file, run as a plugin, makes everything that a shipped hyperspace does."""
import os
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import eval_supernet
from modules.block_kd.student import StudentStage
from modules.errors import UserError
from modules.latency import LatencyPredictor
from modules.latency.candidates import space_blocks
from modules.latency.kernel_model import LatencyError
from modules.latency.tables import write_table
from modules.modeling import layout
from modules.modeling.complexity import network_complexity, sub_stage_complexity
from modules.modeling.network import Network
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.modeling.supernet import Supernet
from modules.search_space import superspace
from modules.search_space.encoding import parse_supernet
from modules.search_space.sampling import max_subnet, min_subnet, sample_subnet
from modules.search_space.superspace import BlockType, SearchSpaceError, get_superspace, register_superspace

from .checkpoints import call, fails
from .conftest import ROOT

PAGE = os.path.join(ROOT, 'docs', 'your_hyperspace.md')
SUPERNET = 'mine-010-002'


def page_blocks():
    """The page's Python: my_space.py, and its use."""
    with open(PAGE, encoding='utf-8') as f:
        return re.findall(r'```python\n(.*?)```', f.read(), re.DOTALL)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    """my_space.py as on the page; what it registers is forgotten at the end."""
    kept = [(table, dict(table)) for table in (layout.LAYOUTS, superspace.SUPERSPACES)]
    path = tmp_path_factory.mktemp('mine') / 'my_space.py'
    path.write_text(page_blocks()[0], encoding='utf-8')
    yield path
    for table, before in kept:
        table.clear()
        table.update(before)


@pytest.fixture
def mine(file, monkeypatch, tmp_path, capsys):
    """The hyperspace as a script's --plugin registers it."""
    assert call(eval_supernet, monkeypatch, '--plugin', file, '--mode', 'lat', '--superspace', 'mine',
                '--supernet_choice', '010-002', '--output_path', tmp_path, '--num_samples', 20) == 0
    assert SUPERNET in capsys.readouterr().out
    return get_superspace('mine')


def subnets(count):
    rng = random.Random(0)
    return [max_subnet(SUPERNET), min_subnet(SUPERNET), *(sample_subnet(SUPERNET, rng) for _ in range(count))]


def test_the_pages_python_runs(mine):
    names = {}
    exec(page_blocks()[1], names)
    assert names['logits'].shape == (1, 1000) and names['ms'] > 0
    assert names['mflops'] > 0 and names['mparams'] > 0


@pytest.mark.parametrize('quant', [False, True])
def test_subnets_equal_their_static_networks(mine, quant):
    torch.manual_seed(0)
    supernet = Supernet.build_from_str(SUPERNET, 10).eval()
    supernet.initialize_weights(zero_last_gamma=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if quant:
            set_quant_mode(supernet)
            supernet.set_max_subnet()
            supernet(images)
        for subnet in subnets(3):
            supernet.set_active_subnet(subnet)
            ours = supernet(images)
            assert ours.shape == (2, 10) and torch.equal(supernet.get_active_subnet()(images), ours)


def test_zero_last_gamma_finds_the_sum(mine):
    supernet = Supernet.build_from_str(SUPERNET, 10)
    supernet.initialize_weights()
    norm = supernet.stages['stage1'].blocks[0].point_conv2.norm
    assert not norm.weight.any() and norm is supernet.stages['stage1'].blocks[0].last_norm()


def test_complexity(mine):
    supernet = Supernet.build_from_str(SUPERNET, 10)
    for subnet in subnets(3):
        supernet.set_active_subnet(subnet)
        network = supernet.get_active_subnet()
        assert network_complexity(network) == network_complexity(supernet)
        assert network_complexity(network)[1] * 1e6 == pytest.approx(sum(p.numel() for p in network.parameters()))
    # one block by hand: 5x5 depth-wise at stride 2, 16 to 64 to 24 channels, projected shortcut, 8x8 pixels out
    flops = (25 * 16 + 16 * 64 + 64 * 24 + 16 * 24) * 64
    assert sub_stage_complexity('mine', 'stage1_0', '5#24#4', (1, 16, 16, 16))[0] == pytest.approx(flops / 1e6)


@pytest.mark.parametrize('block_id', ['stage1_0', 'stage3_0', 'stage2_1'])
def test_block_kd_students(mine, block_id):
    student, rng = StudentStage.build('mine', block_id, 24, 40), random.Random(0)
    for _ in range(3):
        student.sample_active_sub_stage(rng=rng)
        student(torch.randn(2, 24, 8, 8)).square().mean().backward()
    assert student.stage.blocks[0].get_parameter(next(n for n, _ in student.stage.blocks[0].named_parameters()))\
        .grad.any()


def test_latencies(mine, tmp_path):
    """By kernels; not by a model of whole blocks; from a block table, to the digit."""
    config = Supernet.build_from_str(SUPERNET, 10).get_active_subnet_config()
    kernels = LatencyPredictor(mine.platform)
    blocks = space_blocks('mine')
    table = dict(zip(blocks, kernels.predict_blocks(blocks)))
    write_table(tmp_path / 'table.json', table)
    assert min(table.values()) > 0
    # the page's head has 10 classes as the stage table
    assert LatencyPredictor(tmp_path / 'table.json').predict_subnet(config) == pytest.approx(
        kernels.predict_subnet(config))
    with pytest.raises(LatencyError, match='DepthFirstBlock was not fitted'):
        LatencyPredictor('onnx_lut').predict_subnet(config)


def test_onnx(mine):
    """fp32 as torch; INT8 gives the answers of torch's int8, but for a few roundings.

    INT8 without ONNX Runtime's fused kernels: on x86 without VNNI these saturate (docs/onnx.md).
    """
    ort = pytest.importorskip('onnxruntime')
    from modules.deploy.onnx_models import export_fp32, export_int8
    from modules.deploy.quantisation import observe
    from modules.deploy.runtimes import open_session, run_session
    network, images, labels = trained_on_digits()
    with torch.no_grad():
        ours = network(images).numpy()
        np.testing.assert_allclose(run_session(open_session(export_fp32(network)), images.numpy()), ours, rtol=0,
                                   atol=1e-4 * abs(ours).max())
        set_quant_mode(network)
        model = export_int8(network, observe(network, [images[:100]]))
        ours = network(images).argmax(1).numpy()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    theirs = run_session(ort.InferenceSession(model.SerializeToString(), options), images.numpy()).argmax(1)
    assert np.mean(ours == labels.numpy()) > 0.9
    assert np.mean(ours == theirs) > 0.98


def trained_on_digits():
    """(a random subnet of 32 pixels, trained for some seconds, images, labels)."""
    torch.manual_seed(0)
    rng, supernet = random.Random(0), parse_supernet(SUPERNET)
    network = Network.build(supernet, next(s for s in iter(lambda: sample_subnet(supernet, rng), None)
                                           if s.resolution == 32), 10)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    images, labels = F.interpolate(images, size=32), torch.tensor(digits.target)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for batch in torch.randint(len(images), (160, 32)):
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
    return network.eval(), images[:500], labels[:500]


def test_refusals(mine, file, monkeypatch, capsys, tmp_path):
    fails(eval_supernet, monkeypatch, capsys, 'invalid choice', '--superspace', 'yours', '--supernet_choice', '010')
    fails(eval_supernet, monkeypatch, capsys, 'nothing.py: No such file', '--plugin', tmp_path / 'nothing.py',
          '--supernet_choice', SUPERNET)
    fails(eval_supernet, monkeypatch, capsys, 'not a Python file', '--plugin', tmp_path, '--supernet_choice', SUPERNET)
    for name in ('Depth_First', 'DepthFirstBlock'):
        with pytest.raises(UserError, match=name):
            layout.register_block(name, layout.conv_block)
    row = vars(mine)
    for change, said in (({}, 'exists'), ({'name': 'my-space'}, 'not a name'),
                         ({'name': 'm', 'block_types': mine.block_types * 6}, '12 block types'),
                         ({'name': 'm', 'stages': mine.stages[:3] + mine.stages[4:]}, 'stage1, stage2'),
                         ({'name': 'm', 'block_types': (BlockType('ResNetBlock', (5, 3)),)}, 'ascending')):
        with pytest.raises(SearchSpaceError, match=said):
            register_superspace(superspace.Superspace(**{**row, **change}))
