"""A platform adapted to another device: known latencies from few measurements, clear refusals."""
import os

import numpy as np
import pytest

from modules.errors import UserError
from modules.latency import tables
from modules.latency.build_predictor import build
from modules.latency.builder import AGAIN, FIT, HELD_OUT, NETWORK, TEST, Platform, adapted
from modules.latency.candidates import space_blocks
from modules.latency.kernel_model import kernels_of
from modules.latency.validation import Errors, pairs_of

from .test_build_predictor import QUICK, Synthetic, arguments, profiled

ZEN3 = tables.load_platform(os.path.join(tables.DATA, 'epyc_zen3_ort1.32_1t'))[1]
BLOCKS = space_blocks('demo')


def fitted(count, base, factor):
    """(Median error on the rest, model) of a fit to `count` blocks of a device that takes `factor` times ZEN3's ms."""
    blocks = [BLOCKS[i] for i in np.random.default_rng(0).permutation(len(BLOCKS))[:count]]
    ms = factor * ZEN3.predict_blocks(blocks)
    model = adapted(blocks, ms, base)
    rest = [block for block in BLOCKS if block.name in {other.name for other in blocks}]
    return np.median(np.abs(model.predict_blocks(rest) / (factor * ZEN3.predict_blocks(rest)) - 1)), model


def test_a_slower_device_of_the_same_kind_needs_few_blocks():
    nothing, _ = fitted(30, None, 3.0)
    some, model = fitted(30, ZEN3, 3.0)
    assert some < 0.03 < nothing and set(model.nets) == set(ZEN3.nets)


def test_a_scaled_model_is_that_many_times_slower():
    np.testing.assert_allclose(ZEN3.scaled(2.5).predict_blocks(BLOCKS[:50]), 2.5 * ZEN3.predict_blocks(BLOCKS[:50]))


def test_few_chunks_give_a_platform_where_one_is_adapted(tmp_path):
    profile = profiled(tmp_path / 'rows.jsonl', Synthetic(), 3, space='demo')
    with pytest.raises(UserError, match='too little was measured'):
        Platform('few', profile)
    platform = Platform('few', profile, base=ZEN3)
    assert {use: len(platform.rows[use]) for use in (FIT, HELD_OUT, AGAIN, NETWORK, TEST)} == {
        FIT: 60, HELD_OUT: 9, AGAIN: 2, NETWORK: 3, TEST: 6}
    assert Errors(pairs_of(platform.held_out)).median < 0.3          # of a device that is not like ZEN3 at all
    # kernels that were not measured keep a net
    assert {kernel.name for block in BLOCKS for kernel in kernels_of(block)} <= set(platform.model.nets)


def test_a_platform_is_adapted_by_its_name(tmp_path):
    args = arguments(tmp_path, superspace=['demo'], minutes=0.1, from_platform='epyc_zen3_ort1.32_1t')
    folder = build(args, Synthetic, QUICK)
    with open(os.path.join(folder, 'report.md'), encoding='utf-8') as f:
        text = f.read()
    assert 'adapted from: epyc_zen3_ort1.32_1t' in text and 'within ±5 %' in text
    assert set(tables.load_platform(folder)[0]) == set(BLOCKS)


@pytest.mark.parametrize('name, line', [('nowhere', 'not a fitted latency platform'),
                                        ('onnx_lut', 'MobileNetV2Block was not fitted')])
def test_platforms_that_cannot_be_adapted_are_refused_before_anything_is_measured(tmp_path, name, line):
    with pytest.raises(UserError, match=line):
        build(arguments(tmp_path, from_platform=name, superspace=['mobilew']), Synthetic, QUICK)
    assert not os.path.exists(tmp_path / 'measured') and not os.path.exists(tmp_path / 'data')
