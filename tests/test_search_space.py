"""Hyperspaces and encodings: facts of the published spaces, round trips, members only, clear refusals."""
import copy
import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.search_space import sampling
from modules.search_space.encoding import (
    DEPTH_STAGES,
    EncodingError,
    Subnet,
    format_sub_stage,
    parse_block_id,
    parse_sub_stage,
    parse_subnet,
    parse_supernet,
    subnet_config,
)
from modules.search_space.named import find_subnet, find_supernet, named_subnets, named_supernets
from modules.search_space.superspace import SUPERSPACES, SearchSpaceError, get_superspace

from .conftest import GOLDEN

SPACES = st.sampled_from(sorted(SUPERSPACES))
SEEDS = st.integers(0, 2 ** 32)
A0 = ('d1#1#2#2#2#2#2#1_k3#3#3#3#3#3#3#3#3#3#3#3#3_w16#16#32#32#64#64#112#112#144#144#240#240#320'
      '_e0#0.5#4.0#4.0#1.0#1.0#4.0#4.0#4.0#4.0#4.0#4.0#4.0_r160')
VNNI = 'onnxw-151122-023231'


def test_spaces_have_the_published_shape():
    assert len(SUPERSPACES) == 10               # seven published ones, demo, demo_96 and small
    assert len(get_superspace('mobilew').block_ids()) == 42 and len(get_superspace('mobilew').lut_ids()) == 210
    assert len(get_superspace('onnxw').block_ids()) == 36 and len(get_superspace('onnxw').lut_ids()) == 132
    assert get_superspace('mobilew').stage('stage5').widths == (192, 200, 208, 216, 224, 240, 256, 272, 288)
    assert get_superspace('onnxw').stage('stage5').window_widths(1) == (208, 224, 240, 256, 272)
    for space in (space for space in SUPERSPACES.values() if len(space.searchable_stages) == 6):
        assert [space.input_stride(f'stage{i}') for i in range(1, 7)] == [2, 4, 8, 16, 16, 32]
        assert space.resolutions == (160, 176, 192, 208, 224)
    for name in ('mobile_original', 'mobile_v1', 'mobile_v1_res', 'onnx', 'onnx_v1'):
        assert all(stage.num_windows == 1 for stage in get_superspace(name).stages)


def test_demo_space_has_three_searchable_stages():
    space = get_superspace('demo')
    assert space.searchable_stages == ('stage1', 'stage2', 'stage3') and space.resolutions == (32, 40, 48)
    assert len(space.block_types) == 3 and space.input_stride('stage3') * space.stage('stage3').stride == 16
    supernet = parse_supernet('demo-012-101')
    assert str(parse_subnet(str(sampling.max_subnet(supernet)), supernet)) == str(sampling.max_subnet(supernet))
    with pytest.raises(EncodingError, match='6 block types, expected 3, one each for stage1..stage3'):
        parse_supernet('demo-012012')
    with pytest.raises(EncodingError, match='8 depths, expected 5: first_conv stage0 stage1 stage2 stage3'):
        parse_subnet(A0, supernet)


def test_named_networks_are_the_published_ones():
    with open(f'{GOLDEN}/named_networks.yaml', encoding='utf-8') as f:
        published = yaml.safe_load(f)
    assert named_supernets() == published['specific_supernet_encoding_dict']
    assert {name: list(entry) for name, entry in named_subnets().items()} \
        == published['specific_subnet_encoding_dict']
    for name, (supernet, subnet) in named_subnets().items():
        found_supernet, found_subnet = find_subnet(name)
        assert found_supernet == find_supernet(supernet)
        assert str(found_subnet) == subnet


@settings(deadline=None)
@given(SPACES, SEEDS)
def test_supernets_round_trip_and_mutations_stay_inside(name, seed):
    rng = random.Random(seed)
    supernet = sampling.sample_supernet(name, rng)
    assert parse_supernet(str(supernet)) == supernet
    assert parse_supernet(supernet.choice, name) == supernet
    assert parse_supernet(supernet.choice.replace('_', '-'), name) == supernet
    changed = sampling.mutate_block_type(supernet, rng)
    assert sum(a != b for a, b in zip(changed.block_types, supernet.block_types)) == 1
    assert changed.windows == supernet.windows
    changed = sampling.mutate_window(supernet, rng)
    one_window = name in ('mobile_original', 'mobile_v1', 'mobile_v1_res', 'onnx', 'onnx_v1')
    assert sum(a != b for a, b in zip(changed.windows, supernet.windows)) == (0 if one_window else 1)


def _is_member(subnet, supernet):
    return parse_subnet(str(subnet), supernet) == subnet


@settings(deadline=None)
@given(SPACES, SEEDS, st.booleans())
def test_subnets_round_trip_and_operators_stay_inside(name, seed, align):
    rng = random.Random(seed)
    supernet = sampling.sample_supernet(name, rng)
    first, second = (sampling.sample_subnet(supernet, rng, align) for _ in range(2))
    children = [sampling.mutate_subnet(supernet, first, rng, 0.5, 0.5, align),
                sampling.crossover_subnets(first, second, rng, align)]
    for subnet in [first, sampling.max_subnet(supernet), sampling.min_subnet(supernet), *children]:
        assert str(parse_subnet(str(subnet))) == str(subnet)
        assert _is_member(subnet, supernet)
        if align:
            assert all(len(set(blocks)) == 1 for blocks in subnet.stages().values())


@settings(deadline=None)
@given(SPACES, SEEDS)
def test_crossover_takes_every_gene_from_a_parent(name, seed):
    rng = random.Random(seed)
    supernet = sampling.sample_supernet(name, rng)
    parents = [sampling.sample_subnet(supernet, rng) for _ in range(2)]
    child = sampling.crossover_subnets(*parents, rng)
    assert child.resolution in {p.resolution for p in parents}
    for stage, blocks in child.stages().items():
        given_blocks = [p.stages()[stage] for p in parents]
        assert len(blocks) in map(len, given_blocks)
        for i, block in enumerate(blocks):
            for gene in range(3):
                assert block[gene] in {b[i][gene] for b in given_blocks if i < len(b)}


def test_mutation_probability_zero_changes_nothing_and_one_redraws():
    rng = random.Random(0)
    supernet = parse_supernet(VNNI)
    subnet = sampling.sample_subnet(supernet, rng)
    assert sampling.mutate_subnet(supernet, subnet, rng, 0, 0) == subnet
    mutants = {str(sampling.mutate_subnet(supernet, subnet, rng, 1, 1)) for _ in range(50)}
    assert len(mutants) == 50


@settings(deadline=None)
@given(SPACES, SEEDS)
def test_sub_stages_round_trip(name, seed):
    rng = random.Random(seed)
    lut_id = rng.choice(get_superspace(name).lut_ids())
    blocks, cin, resolution = sampling.sample_sub_stage(name, lut_id, rng)
    assert parse_sub_stage(name, lut_id, format_sub_stage(blocks)) == blocks
    assert str(parse_block_id(name, lut_id)) == lut_id
    space = get_superspace(name)
    assert resolution in space.kd_resolutions and cin in space.input_widths(lut_id.split('_')[0])


def test_sampling_reaches_every_choice():
    rng = random.Random(0)
    supernet = parse_supernet('mobilew-601234-100000')
    subnets = [sampling.sample_subnet(supernet, rng) for _ in range(800)]
    for stage in DEPTH_STAGES:
        blocks = [block for subnet in subnets for block in subnet.stages()[stage]]
        block_type = supernet.block_type(stage)
        for gene, choices in enumerate((block_type.kernels, supernet.widths(stage), block_type.expands)):
            assert {block[gene] for block in blocks} == set(choices)
        assert {len(subnet.stages()[stage]) for subnet in subnets} == set(supernet.superspace.stage(stage).depths)


@pytest.mark.parametrize('text, superspace, said', [
    ('onnxw-1511222-023231', None, '7 block types, expected 6'),
    ('onnxw-151122-0232311', None, '7 width windows, expected 6'),
    ('onnxw-159122-023231', None, 'stage3: block type 9 is not one of 0 1 2 3 4 5'),
    ('onnxw-151122-023239', None, 'stage6: width window 9 is not one of 0 1 2 3'),
    ('onyx-151122-023231', None, "no superspace 'onyx'"),
    ('mobilew-151122-023231', 'onnxw', 'a supernet of mobilew, not of onnxw'),
    ('151122_02323a', 'onnxw', "stage6: 'a' in '02323a' is not a digit (width windows)"),
    ('151122-023231-1', 'onnxw', '3 parts, expected block types and width windows'),
    ('151122_', 'onnxw', '0 width windows, expected 6'),
    ('', 'onnxw', '0 block types, expected 6'),
    ('١٥١١٢٢', 'onnxw', "stage1: '١' in '١٥١١٢٢' is not a digit"),
    ('151122-023231', None, 'the superspace is missing'),
    ('151122-023231\n', 'onnxw', '7 width windows'),
    (151122, 'onnxw', 'an encoding is a string, not int'),
    (None, 'onnxw', 'an encoding is a string, not NoneType'),
    (parse_supernet('mobilew-000000-000000'), 'onnxw', 'a supernet of mobilew, not of onnxw'),
])
def test_bad_supernets_are_refused_by_stage_value_and_choices(text, superspace, said):
    with pytest.raises(EncodingError) as error:
        parse_supernet(text, superspace)
    assert said in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('old, new, said', [
    ('w16#16#32', 'w16#16#24', 'stage1 block 0: width 24 is not one of 32 48'),
    ('#112#112#', '#112#192#', 'stage3 block 1: width 192 is not one of 112 128 144'),
    ('k3#3#3', 'k3#3#7', 'stage1 block 0: kernel 7 is not one of 3 5'),
    ('e0#0.5#4.0', 'e0#0.5#3.0', 'stage1 block 0: expand ratio 3.0 is not one of 4 6 8'),
    ('e0#0.5', 'e1.0#0.5', 'first_conv block 0: expand ratio 1.0 is not one of 0'),
    ('r160', 'r168', 'resolution 168 is not one of 160 176 192 208 224'),
    ('d1#1#2', 'd1#1#1', 'k: 13 values, expected one per block: 12'),
    ('d1#1#2#2#2#2#2#1', 'd1#1#2#2#1#3#2#1', 'stage3: depth 1 is not one of 2 3 4 5 6'),
    ('d1#1#2', 'd1#2', 'd: 7 depths, expected 8'),
    ('e0#', 'e#', 'malformed number'),
    ('_r160', '', 'not a subnet encoding'),
    ('_r160', '_r0160', 'not a subnet encoding'),
    ('d1#1', 'd01#1', 'not as it would be printed: d1#1#'),
    ('e0#0.5#4.0', 'e0#0.5#4', 'not as it would be printed'),
])
def test_bad_subnets_are_refused_by_stage_value_and_choices(old, new, said):
    assert old in A0
    with pytest.raises(EncodingError) as error:
        parse_subnet(A0.replace(old, new, 1), VNNI)
    assert said in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('block_id, text, said', [
    ('stage3_5', '5#72#6', 'depth 1 is not one of 2 3 4 5 6'),
    ('stage3_5', '5#72#6_3#72#None', 'block 1: 3#72#None: expand ratio None is not one of 3 6 8'),
    ('stage3_5_0', '5#72#6_3#112#6', 'block 1: 3#112#6: width 112 is not one of 56 64 72'),
    ('stage3_5', '5#72#6_9#72#6', 'kernel 9 is not one of 3 5 7'),
    ('stage3_5', '5#72#6_', 'not kernel#width#expand'),
    ('stage3_9', '5#72#6', 'block type 9 is not one of 0 1 2 3 4 5 6'),
    ('stage3_5_9', '5#72#6', 'width window 9 is not one of 0 1 2 3 4 5'),
    ('stage0_0', '5#72#6', 'not a block id'),
    ('stage3_05', '5#72#6', 'not a block id'),
    ('stage3_5', '05#72#6_3#72#6', 'kernels 3 5 7, widths 56 64'),
    ('stage3_5', '9' * 5000 + '#72#6', 'not kernel#width#expand'),
    ('stage3', '5#72#6', 'not a block id'),
])
def test_bad_sub_stages_are_refused(block_id, text, said):
    with pytest.raises(EncodingError) as error:
        parse_sub_stage('mobilew', block_id, text)
    assert said in str(error.value)


def test_expand_ratios_come_back_as_declared():
    assert parse_sub_stage('mobilew', 'stage5_3', '3#208#0.5_5#200#1.0') == [(3, 208, 0.5), (5, 200, 1.0)]
    with pytest.raises(EncodingError):
        parse_sub_stage('mobilew', 'stage5_3', '3#208#0.5_5#200#1')


@given(st.text(max_size=60))
def test_no_text_breaks_a_parser(text):
    for parse in (parse_supernet, parse_subnet, lambda t: parse_block_id('onnxw', t),
                  lambda t: parse_sub_stage('onnxw', 'stage3_1', t), lambda t: parse_supernet(t, 'onnxw')):
        try:
            parse(text)
        except SearchSpaceError as error:
            assert str(error)


def test_config_follows_channels_and_strides():
    config = subnet_config(VNNI, A0)
    assert config.resolution == 160 and len(config.blocks) == 16
    assert [b.hw for b in config.blocks] == [160, 80, 80, 40, 40, 20, 20, 10, 10, 10, 10, 5, 5, 5, 5, 1]
    assert all(a.cout == b.cin for a, b in zip(config.blocks, config.blocks[1:]))
    assert config.blocks[-1].stride == 0 and config.blocks[-1].cout == 1000
    assert subnet_config(VNNI, A0, num_classes=10).blocks[-1].cout == 10
    odd = subnet_config(VNNI, A0.replace('r160', 'r208'))
    assert odd.blocks[-3].hw == 7                                # 208 / 32 = 6.5, rounded up


def test_subnets_and_supernets_are_values():
    assert len({parse_supernet(VNNI), parse_supernet(VNNI), parse_supernet('onnx-000000')}) == 2
    assert copy.deepcopy(parse_supernet(VNNI)) == parse_supernet(VNNI)
    assert parse_supernet(copy.deepcopy(parse_supernet(VNNI)), 'onnxw') == parse_supernet(VNNI)
    assert parse_subnet(A0) == parse_subnet(A0) and len({parse_subnet(A0), parse_subnet(A0)}) == 1
    assert isinstance(parse_subnet(A0), Subnet)
