"""Every training step runs where the device is no CPU: no mixing of devices, no wait for a value; launches are counted.

See tests/meta.py. All of one resolution and with few images: what is counted does not depend on them.
"""
import random

import pytest
import torch

from modules.block_kd import trainer
from modules.block_kd.student import new_student
from modules.block_kd.teacher import build_teacher
from modules.modeling.ops import fake_quantise
from modules.modeling.ops.lsq_plus import quantised_ops, set_fp32_mode, set_quant_mode
from modules.modeling.supernet import Supernet
from modules.search_space.named import find_supernet
from modules.search_space.superspace import get_superspace
from modules.training.calibrate import calibrate, initialize_all_scales, kept_statistics
from modules.training.data import NORMALIZATIONS, to_floats
from modules.training.distributed import Job
from modules.training.supernet_trainer import SupernetRecipe, sandwich

from .meta import Launches

META = torch.device('meta')
# launches of a sandwich (largest, two random, smallest subnet; seed 0): what they are now, with a little room
MOST = {'spaceevo@vnni': {'fp32': 3800, 'int8': 6900, 'int8, eager': 26500},
        'spaceevo@pixel4': {'fp32': 5700, 'int8': 10500, 'int8, eager': 41000}}


def images(count=2, size=224):
    pixels = torch.empty(count, 3, size, size, dtype=torch.uint8, device=META)
    return to_floats(pixels, NORMALIZATIONS['half']).contiguous(memory_format=torch.channels_last)


def in_int8(model):
    """The model in int8 mode, its scales initialised."""
    for op in quantised_ops(set_quant_mode(model)):
        op.scales_initialized = True
    return model


@pytest.fixture(scope='module', params=['spaceevo@vnni', pytest.param('spaceevo@pixel4', marks=pytest.mark.slow)])
def supernet(request):
    with META:
        return Supernet(find_supernet(request.param)).to(memory_format=torch.channels_last), MOST[request.param]


@pytest.mark.parametrize('kind', ['fp32', 'int8', 'int8, eager'])
def test_a_sandwich_of_the_published_supernets(supernet, kind, monkeypatch):
    model, most = supernet
    set_fp32_mode(model)
    if kind != 'fp32':
        in_int8(model)
    if kind == 'int8':
        pytest.importorskip('triton')
    monkeypatch.setattr(fake_quantise, '_use_kernels', kind == 'int8')
    labels = torch.empty(2, dtype=torch.int64, device=META)
    model.zero_grad()
    with Launches() as launches:
        losses = sandwich(model, images(), labels, SupernetRecipe(), random.Random(0))
    assert 0.9 * most[kind] < launches.count <= most[kind], launches.kinds.most_common(9)
    assert all(loss.device == META for loss in losses)


def test_calibration_and_first_scales(supernet):
    model = set_quant_mode(supernet[0])
    for op in quantised_ops(model):
        op.scales_initialized = False
    model.set_min_subnet()
    with Launches(), kept_statistics(model):
        calibrate(model, [images()])
    with Launches():
        initialize_all_scales(model, images(), model.set_min_subnet, [])
    assert any(op.scales_initialized for op in quantised_ops(model))


@pytest.mark.parametrize('name', ['mobilew', 'onnxw'])
def test_block_kd_sandwiches_of_all_block_types(name):
    """In int8, which does all that fp32 does."""
    space = get_superspace(name)
    recipe = trainer.BlockKDSettings(inplace_distill_from_teacher=True)
    part_input = torch.empty(2, 40, 28, 28, device=META).contiguous(memory_format=torch.channels_last)
    features = {hw: (part_input, torch.empty(2, 64, 14, 14, device=META)) for hw in (160, 192, 224)}
    for block in (block for block in space.block_ids() if block.startswith('stage2_')):
        with META:
            student = in_int8(new_student(space, block, 40, 64))
        with Launches() as launches:
            losses = trainer._sandwich('stage2', student.train(), [224, 160], features, random.Random(0),
                                       recipe, Job(device=META))
        assert len(losses) == 2 and launches.count > 100


def test_a_teacher_and_its_fine_tuning():
    teacher = in_int8(build_teacher('efficientnet-b0', weights='random').to(META))
    with Launches():
        maps = teacher.forward_stages(images(), ['stage3', 'head'])
        assert maps['stage3'][1].device == META
        with teacher.fine_tuning():
            teacher(images()).sum().backward()


def test_what_waits_for_a_device_or_mixes_devices_is_found():
    x = torch.empty(3, device=META)
    with Launches(), pytest.raises((RuntimeError, NotImplementedError)):
        float(x.sum())
    with Launches(), pytest.raises((RuntimeError, NotImplementedError)):
        x.cpu()
    with Launches(), pytest.raises((RuntimeError, NotImplementedError)):
        x.nonzero()
    with Launches(), pytest.raises(AssertionError, match='tensors on cpu and meta'):
        torch.add(x, torch.ones(3))
    with Launches(), pytest.raises(AssertionError, match='not deterministic on CUDA'):
        x.cumsum(0)
