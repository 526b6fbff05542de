"""Predictors of new devices: known latencies are recovered, noise is refused, a killed run continues, scripts work."""
import importlib
import json
import os
import random
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from modules.errors import UserError
from modules.files import new_folder
from modules.latency import LatencyPredictor, builder, tables
from modules.latency.build_predictor import build, check_repeated
from modules.latency.builder import AGAIN, FIT, HELD_OUT, NETWORK, TEST, Platform, measure, rows_of, weights_mb
from modules.latency.candidates import (
    Candidates,
    named_networks,
    random_network,
    region,
    smallest_network,
    space_blocks,
)
from modules.latency.exchange import import_table, platform_table
from modules.latency.kernel_model import kernel_work, kernels_of
from modules.latency.profiling import Profile, Timing, time_in_turns
from modules.latency.validation import Errors, check_name, pairs_of, spearman
from modules.search_space.block import Block

from .checkpoints import call
from .conftest import ROOT

pytestmark, DEEP = pytest.mark.usefixtures('deep_space'), 'demo_deep'

# of the synthetic device: ms a call, ms per MB of weights fetched anew, ms a call of a block alone beyond that
CALL, RATE, MORE = 0.008, 0.05, 0.001
QUICK = Timing(rounds=3, turn_ms=0, warmup=1)
V2 = Block('MobileNetV2ResBlock', 8, 16, 16, 3, 6, 1, 'relu6')


def true_ms(block):
    """What a block costs the synthetic device in a network."""
    speed = {'conv-bn-relu': 3e7, 'dwconv-bn-relu': 6e6, 'fc': 1e7}
    kernels = kernels_of(block)
    return sum(0.002 + work / speed.get(kernel.name, 2e6) for kernel, work in zip(kernels, kernel_work(kernels)))


class Synthetic:
    """Known latencies. scatter: {block type: relative standard deviation of its blocks, fixed for each block}."""

    def __init__(self, scatter=None, slow=lambda: 1.0, lives=None):
        self.scatter, self.slow, self.lives = scatter or {}, slow, lives

    def __str__(self):
        return 'synthetic'

    def block(self, block):
        draw = np.random.default_rng(zlib.crc32(repr(block).encode())).standard_normal()
        return true_ms(block) * np.exp(self.scatter.get(block.name, 0) * draw)

    def prepare(self, blocks):
        if self.lives is not None:
            self.lives -= 1
            if not self.lives:
                raise KeyboardInterrupt
        alone = len(blocks) == 1
        ms = CALL + sum(self.block(block) - alone * (RATE * weights_mb(block) - MORE) for block in blocks)
        return lambda count: [ms * self.slow()] * count


class Counted(Profile):
    """A Profile whose clock is the number of chunks."""

    @property
    def seconds(self):
        return len({row.chunk for row in self.rows})


def profiled(path, device, chunks, resume=False, kind=Counted, space=DEEP):
    profile = kind(str(path), device, smallest_network(space), {'device': str(device)}, resume, timing=QUICK)
    measure(profile, [space], builder.test_networks([space], 6, 0), chunks / (1 - builder.RESERVE) / 60,
            say=lambda line: None)
    return profile


@pytest.fixture(scope='module')
def measured(tmp_path_factory, deep_space):
    return profiled(tmp_path_factory.mktemp('measured') / 'rows.jsonl', Synthetic(), 32)


def test_known_latencies_are_recovered(measured):
    platform = Platform('known', measured)
    assert platform.context.rate == pytest.approx(RATE, rel=0.2)
    assert platform.context.call == pytest.approx(MORE, abs=4e-4)
    blocks, networks = Errors(pairs_of(platform.held_out)), Errors(pairs_of(platform.networks))
    assert len(platform.held_out) > 80 and blocks.within(0.1) >= 0.95 and blocks.median < 0.03
    assert networks.worst < 0.06 and spearman(platform.networks) > 0.9
    fitted = {row.blocks for row in platform.rows[FIT]}
    assert not fitted & {(block,) for block, *_ in platform.held_out}
    for block, _, ms in platform.held_out:
        assert ms == pytest.approx(true_ms(block), rel=0.2)     # the rate is of the weights, a part of it


def test_rows_are_what_the_device_takes_without_the_call(measured):
    for row in measured.rows:
        alone = len(row.blocks) == 1
        expected = sum(map(true_ms, row.blocks)) - alone * (RATE * sum(map(weights_mb, row.blocks)) - MORE)
        call = CALL * (row.blocks[0].name == 'FirstConvBlock')
        assert row.ms == pytest.approx(expected + call, rel=1e-9), row.use
    uses = [row.use.partition(' ')[0] for row in measured.rows]
    assert {use: uses.count(use) for use in uses} == {TEST: 35, FIT: 640, HELD_OUT: 96, AGAIN: 31, NETWORK: 32}


def test_more_blocks_where_the_error_is(tmp_path):
    scattered = profiled(tmp_path / 'rows.jsonl', Synthetic({'MobileNetV3ResBlock': 0.3}), 32)
    shares = [np.mean([row.blocks[0].name == 'MobileNetV3ResBlock' for row in part])
              for fitted in [rows_of(scattered, FIT)]
              for part in (fitted[:builder.FIRST_REFIT], fitted[builder.FIRST_REFIT:])]
    assert shares[1] > 1.2 * shares[0]


def test_regions_without_figures_count_as_all_do():
    candidates = Candidates([DEEP], random.Random(0))
    blocks = candidates.draw(40)
    candidates.aim(blocks, [0.5 if region(b) == region(blocks[0]) else 0.01 for b in blocks])
    seen = set(map(region, blocks))
    unseen = {weight for name, weight in candidates.weights.items() if name not in seen}
    assert max(candidates.weights, key=candidates.weights.get) == region(blocks[0])
    assert len(unseen) == 1 and min(candidates.weights.values()) < min(unseen) < max(candidates.weights.values())


def test_every_block_is_drawn_once_and_small_regions_are_never_held_out():
    candidates = Candidates([DEEP], random.Random(0))
    held = candidates.draw(100, held_out=True)
    drawn = held + candidates.draw(10 ** 4)
    assert sorted(map(repr, drawn)) == sorted(map(repr, space_blocks(DEEP)))
    assert not {block.name for block in held} & {'FirstConvBlock', 'LogitsBlock', 'FinalExpandBlock'}


# Noise

def test_the_lower_quartile_of_rounds_counts():
    times = iter([1.0, 1.0, 9.0, 9.0] * 4)              # half of the rounds are disturbed

    def run(count):
        return [next(times) for _ in range(count)]
    ms, spread = time_in_turns([run], Timing(rounds=8, warmup=0, turn_ms=0))
    assert ms == [1.0] and spread[0] == pytest.approx(4.0)


def test_a_disturbed_chunk_is_measured_again(tmp_path):
    busy = [1.0]
    profile = Profile(str(tmp_path / 'rows.jsonl'), Synthetic(slow=lambda: busy[0]), smallest_network(DEEP), {},
                      timing=QUICK)
    items = [(FIT, (V2,))]
    quiet = profile.chunk(0, items)[0].ms
    calls = [0]

    def slow():
        calls[0] += 1
        return 2.0 if calls[0] < 15 else 1.0            # the first measurement of the next chunk
    profile.device.slow = slow
    assert profile.chunk(1, items)[0].ms == pytest.approx(quiet)
    profile.device.slow = lambda: 2.0                   # longer than TRIES: the row is left out
    assert profile.chunk(2, items)[0].ms == pytest.approx(2 * quiet)
    assert profile.quiet_chunks() == {0, 1}
    assert profile.disturbed() == pytest.approx(1 / 3)


def test_a_block_without_others_like_it_is_measured_until_nothing_disturbs(tmp_path, monkeypatch):
    """The classifier is the only block of its kind; here the chunk that it is drawn for is disturbed."""
    def begun(path):
        profile = Counted(str(path), Synthetic(), smallest_network(DEEP), {}, timing=QUICK)
        profile.device.slow = lambda: 1.0 if profile.rows else 2.0
        measure(profile, [DEEP], builder.test_networks([DEEP], 6, 0), 8 / (1 - builder.RESERVE) / 60, seed=0,
                say=lambda line: None)
        assert profile.quiet_chunks() == set(range(1, 8))
        return profile
    profile = begun(tmp_path / 'rows.jsonl')
    assert sum(row.blocks[0].name == 'LogitsBlock' for row in profile.rows if row.use == FIT) == 2
    assert Platform('known', profile, epochs=2).model.nets.keys() > {'fc'}
    monkeypatch.setattr(builder, '_lost', lambda *_: [])
    with pytest.raises(UserError, match='too little was measured undisturbed .*no fc'):
        Platform('known', begun(tmp_path / 'others.jsonl'), epochs=2)


def arguments(tmp_path, **more):
    return SimpleNamespace(**{'platform': 'new', 'superspace': [DEEP], 'minutes': 0.3, 'networks': 4, 'seed': 0,
                              'max_drift': 0.1, 'max_disturbed': 0.33, 'resume': False, 'force': False,
                              'from_platform': None, 'output': str(tmp_path / 'measured'),
                              'data': str(tmp_path / 'data'), **more})


def test_too_much_noise_is_refused_and_nothing_is_written(tmp_path):
    noise = random.Random(0)
    device = Synthetic(slow=lambda: 1 + noise.random() * 3)
    with pytest.raises(UserError, match=r'too noisy: one and the same model took [\d.]+ to [\d.]+ ms') as error:
        build(arguments(tmp_path), lambda: device, QUICK)
    assert '\n' not in str(error.value) and not os.path.exists(tmp_path / 'data')


def test_a_disturbed_start_is_put_up_with(tmp_path):
    profile = Counted(str(tmp_path / 'rows.jsonl'), Synthetic(), smallest_network(DEEP), {}, timing=QUICK)
    profile.device.slow = lambda: 2.0 if len({row.chunk for row in profile.rows}) < 6 else 1.0
    measure(profile, [DEEP], builder.test_networks([DEEP], 6, 0), 40 / (1 - builder.RESERVE) / 60,
            say=lambda line: None)
    profile.check()
    assert profile.quiet_chunks() == set(range(6, 40))


def test_what_was_refused_as_too_noisy_is_resumed_when_it_is_quiet(tmp_path):
    noise = random.Random(0)
    with pytest.raises(UserError, match='too noisy'):
        profiled(tmp_path / 'rows.jsonl', Synthetic(slow=lambda: 1 + noise.random() * 3), 30)
    chunks = (tmp_path / 'rows.jsonl').read_text().count('\n') - 1
    assert 10 <= chunks < 30
    profile = profiled(tmp_path / 'rows.jsonl', Synthetic(), 30 + 3 * chunks, resume=True)
    profile.check()
    assert profile.quiet_chunks() >= set(range(chunks, 30 + 3 * chunks))


def test_of_a_busy_machine_the_quiet_chunks_count(tmp_path):
    path = str(tmp_path / 'rows.jsonl')
    profile = Counted(path, Synthetic(), smallest_network(DEEP), {}, max_disturbed=0.9, timing=QUICK)
    profile.device.slow = lambda: 1.0 if len({row.chunk for row in profile.rows}) % 5 == 3 else 1.6
    measure(profile, [DEEP], builder.test_networks([DEEP], 6, 0), 35 / (1 - builder.RESERVE) / 60,
            say=lambda line: None)
    profile.check()
    assert profile.quiet_chunks() == set(range(3, 35, 5)) and profile.disturbed() == pytest.approx(0.8, abs=0.02)
    assert {row.chunk for row in rows_of(profile, FIT)} == profile.quiet_chunks()
    assert len(Platform('busy', profile, epochs=2).held_out) == 21


def test_a_noisy_run_is_resumed_with_another_max_drift(tmp_path):
    noise = random.Random(0)
    device = Synthetic(slow=lambda: 1 + noise.random() * 3)
    with pytest.raises(UserError, match='too noisy'):
        profiled(tmp_path / 'rows.jsonl', device, 30)
    profile = Counted(str(tmp_path / 'rows.jsonl'), device, smallest_network(DEEP), {'device': str(device)}, True,
                      9.0, timing=QUICK)
    measure(profile, [DEEP], builder.test_networks([DEEP], 6, 0), 40 / (1 - builder.RESERVE) / 60,
            say=lambda line: None)
    assert profile.quiet_chunks() == set(range(40))


def test_a_refused_run_whose_time_is_used_up_gets_more(tmp_path, monkeypatch):
    # minutes are chunks then, however slow the machine
    monkeypatch.setattr('modules.latency.build_predictor.Profile', Counted)
    noise = random.Random(0)
    with pytest.raises(UserError, match='too noisy'):
        build(arguments(tmp_path, minutes=0.05), lambda: Synthetic(slow=lambda: 1 + noise.random() * 3), QUICK)
    with pytest.raises(UserError, match='too noisy'):           # and again while it stays noisy
        build(arguments(tmp_path, minutes=0.05, resume=True),
                   lambda: Synthetic(slow=lambda: 1 + noise.random() * 3), QUICK)
    folder = build(arguments(tmp_path, minutes=0.3, resume=True, max_disturbed=0.9), Synthetic, QUICK)
    assert os.path.isfile(os.path.join(folder, 'report.md'))


def test_blocks_that_take_another_time_are_refused():
    again = [(1.0, 1.0)] * 12 + [(1.0, 1.3)] * 8
    with pytest.raises(UserError, match='too noisy: of 20 blocks that were measured twice, 60%'):
        check_repeated(SimpleNamespace(again=again), 0.1)
    check_repeated(SimpleNamespace(again=again), 0.3)
    check_repeated(SimpleNamespace(again=again[-8:]), 0.1)         # too few to tell


def test_too_little_is_refused(tmp_path):
    with pytest.raises(UserError, match='too little was measured undisturbed'):
        build(arguments(tmp_path, minutes=1e-6), Synthetic, QUICK)
    assert not os.path.exists(tmp_path / 'data')


# Killed and resumed

def test_a_killed_run_goes_on_to_the_same(tmp_path, measured):
    path = tmp_path / 'rows.jsonl'
    with pytest.raises(KeyboardInterrupt):
        profiled(path, Synthetic(lives=430), 32)
    with open(path, 'a', encoding='utf-8') as f:
        f.write('{"chunk": 17, "rows": [["fit", 0.1, 0.0, "MobileNetV2ResBlock_24_32')      # it was being written
    device = Synthetic(lives=10 ** 9)
    resumed = profiled(path, device, 32, resume=True)
    assert [row._replace(seconds=0) for row in resumed.rows] == [row._replace(seconds=0) for row in measured.rows]
    assert 10 ** 9 - device.lives < 500                                     # what was measured is not again
    with open(path, encoding='utf-8') as f:
        assert '_24_32{' not in f.read()


def test_a_profile_is_measured_on(tmp_path):
    """As build() does after a refusal; the draws of the first pass do not depend on what came after them."""
    profile = profiled(tmp_path / 'rows.jsonl', Synthetic(), 32)
    before = profile.rows
    measure(profile, [DEEP], builder.test_networks([DEEP], 6, 0), 40 / (1 - builder.RESERVE) / 60,
            say=lambda line: None)
    assert profile.rows[:len(before)] == before and profile.quiet_chunks() == set(range(40))


def test_measurements_of_another_device_are_not_resumed(tmp_path, measured):
    path = tmp_path / 'rows.jsonl'
    with open(measured.path, encoding='utf-8') as f:
        path.write_text(f.read().replace('synthetic', 'another'))
    with pytest.raises(UserError, match='made with device another, not synthetic'):
        profiled(path, Synthetic(), 4, resume=True)


def test_a_damaged_measurement_is_named(tmp_path, measured):
    path = tmp_path / 'rows.jsonl'
    with open(measured.path, encoding='utf-8') as f:
        path.write_text(f.read().replace('MobileNetV2ResBlock', 'MobileNetV2ResBlok_x', 1))
    with pytest.raises(UserError, match='rows.jsonl:.*not a line of this run'):
        profiled(path, Synthetic(), 4, resume=True)


# Registering

@pytest.mark.parametrize('name', ['', 'a/b', '.hidden', 'table.json'])
def test_impossible_names_are_refused(name):
    with pytest.raises(UserError, match='a platform is named such as my_host'):
        check_name(name)


def test_a_platform_is_replaced_only_by_force_and_only_whole(tmp_path):
    folder = tmp_path / 'there'
    folder.mkdir()
    (folder / 'old').write_text('1')
    with pytest.raises(UserError, match='--force'):
        check_name('there', str(tmp_path))
    with pytest.raises(RuntimeError), new_folder(str(folder)) as temporary:
        open(os.path.join(temporary, 'half'), 'w').close()
        raise RuntimeError
    assert os.listdir(tmp_path) == ['there'] and os.listdir(folder) == ['old']
    with new_folder(check_name('there', str(tmp_path), True)) as temporary:
        open(os.path.join(temporary, 'new'), 'w').close()
    assert os.listdir(tmp_path) == ['there'] and os.listdir(folder) == ['new']


def test_networks_are_of_their_spaces():
    assert len(named_networks(['mobilew', 'onnxw'])) == 10
    assert all('vnni' in name for name in named_networks(['onnxw'])) and not named_networks(['demo'])
    blocks = set(space_blocks('onnxw'))
    assert all(set(random_network('onnxw', random.Random(seed))) <= blocks for seed in range(20))
    assert {block for network in named_networks(['onnxw']).values() for block in network} <= blocks


# Exchange with nn-Meter's tables

@pytest.fixture
def script(monkeypatch, capsys):
    """(code, output) of a script of onnx_tools in this process."""
    def called(name, *args):
        affinity = os.sched_getaffinity(0)
        code = call(importlib.import_module(f'onnx_tools.{name}'), monkeypatch, *args)
        os.sched_setaffinity(0, affinity)
        return code, ''.join(capsys.readouterr())
    return called


def test_export_and_import_lose_nothing(tmp_path, script):
    path, again = tmp_path / 'lut.json', tmp_path / 'again.json'
    code, out = script('export_lut', '--platform', 'onnx_lut', '--output', path)
    assert code == 0, out
    table, _ = tables.load_platform(os.path.join(tables.DATA, 'onnx_lut'))
    assert tables.read_table(path) == {Block(*key): ms for key, ms in table.items()}
    few = dict(random.Random(0).sample(sorted(json.loads(path.read_text()).items()), 400))
    few.update({'MobileNetV2ResBlock_112_16_16_3_4_1_relu6': 1.5502461234567891,
                'ResNetBlock_7_304_448_7_1.5_1_relu': 17.3})
    path.write_text(json.dumps(few))
    code, out = script('import_lut', '--table', path, '--platform', 'mine', '--data', tmp_path / 'data',
                       '--epochs', 5)
    assert code == 0, out
    table, model = tables.load_platform(str(tmp_path / 'data' / 'mine'))
    tables.write_table(again, {Block(*key): ms for key, ms in table.items()})
    assert json.loads(again.read_text()) == few
    assert model.predict_blocks([Block('ResNetBlock', 7, 320, 448, 7, 1.5, 1, 'relu')])[0] > 0
    code, out = script('import_lut', '--table', path, '--platform', 'mine', '--data', tmp_path / 'data')
    assert code == 2 and out.startswith('error: ') and out.count('\n') == 1


def test_a_space_is_exported_with_predictions():
    table = platform_table('onnx_lut', ['demo'])
    assert set(table) == set(space_blocks('demo'))
    block = space_blocks('demo')[40]
    assert table[block] == pytest.approx(LatencyPredictor('onnx_lut').predict_block(*block), rel=1e-12)


def test_an_imported_table_is_learned(tmp_path):
    blocks = space_blocks(DEEP)
    tables.write_table(tmp_path / 'lut.json', {block: true_ms(block) for block in blocks})
    count, error = import_table(str(tmp_path / 'lut.json'), str(tmp_path / 'mine'))
    assert count == len(blocks) and error < 0.03


def test_a_table_without_stem_and_head_is_imported_with_them(tmp_path):
    blocks = [block for block in space_blocks(DEEP) if block.name.startswith(('MobileNet', 'Fused'))][::2]
    ours = dict(zip(blocks, (3 * ms for ms in LatencyPredictor('onnx_lut').predict_blocks(blocks))))
    tables.write_table(tmp_path / 'lut.json', ours)
    _, error = import_table(str(tmp_path / 'lut.json'), str(tmp_path / 'mine'), epochs=4)
    table, model = tables.load_platform(str(tmp_path / 'mine'))
    rest = [block for block in space_blocks(DEEP) if block not in table]
    ratio = model.predict_blocks(rest) / LatencyPredictor('onnx_lut').predict_blocks(rest)
    assert {'FirstConvBlock', 'LogitsBlock'} < {block.name for block in rest}
    assert error < 0.1 and np.quantile(ratio, [0.1, 0.5, 0.9]) == pytest.approx([3, 3, 3], rel=0.15)


# ONNX Runtime

def test_a_block_alone_computes_what_it_does_in_a_network(tmp_path):
    onnx, ort = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    from modules.deploy.devices import onnx_chain
    for block, ops in ((V2, {'QLinearConv': 3, 'QLinearAdd': 1}),
                       (V2._replace(cout=48, stride=2), {'QLinearConv': 4, 'QLinearAdd': 1})):
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / 'model.onnx'), 3
        ort.InferenceSession(onnx_chain([block]).SerializeToString(), options, providers=['CPUExecutionProvider'])
        nodes = [node.op_type for node in onnx.load(tmp_path / 'model.onnx').graph.node]
        assert {op: nodes.count(op) for op in nodes} == ops         # no float map, nothing turned around


def test_ort_times_blocks_networks_and_nothing():
    pytest.importorskip('onnxruntime')
    from modules.deploy.devices import OnnxDevice
    device, network = OnnxDevice(), smallest_network('demo')
    assert 'ONNX Runtime' in str(device)
    runs = [device.prepare(blocks) for blocks in ((), network[:1], network[1:2], network[-1:], network)]
    ms, _ = time_in_turns(runs, Timing(rounds=5))
    assert 0 < ms[0] < min(ms[1:]) and max(ms) == ms[-1] < 100


@pytest.mark.slow
def test_tflite_times_blocks_as_parts_of_a_network():
    pytest.importorskip('ai_edge_litert')
    code = ('''
from modules.deploy.devices import LiteRtDevice, PhoneDevice, tflite_chain
from modules.latency.candidates import smallest_network
from modules.latency.profiling import Timing, time_in_turns
from ai_edge_litert import schema_py_generated as schema
network, device = smallest_network('demo'), LiteRtDevice()
tree = schema.ModelT.InitFromObj(schema.Model.GetRootAs(tflite_chain(network[2:3])))
codes = [tree.operatorCodes[op.opcodeIndex].builtinCode for op in tree.subgraphs[0].operators]
assert not {schema.BuiltinOperator.QUANTIZE, schema.BuiltinOperator.DEQUANTIZE} & set(codes), codes
ms, _ = time_in_turns([device.prepare(blocks) for blocks in ((), network[:1], network[-1:], network)], Timing(rounds=3))
assert 0 < min(ms) and max(ms[:3]) < ms[3] < 100, ms    # nothing and the last layer take 2 microseconds each
class Phone:
    threads, mask, seen = 1, '40', []
    def latency(self, model, warmup, runs):
        self.seen.append((len(model), warmup, runs))
        return type('Latency', (), {'mean': 1.5})
phone = PhoneDevice(Phone(), 'a phone')
ms, _ = time_in_turns([phone.prepare(network[:1])], Timing(rounds=2, warmup=0, runs=20))
assert ms == [1.5] and [runs for *_, runs in Phone.seen] == [20, 20] and 'cores 40' in str(phone)
''')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr


def test_the_script_end_to_end(tmp_path, script):
    pytest.importorskip('onnxruntime')
    data = tmp_path / 'data'
    args = ['build_predictor', '--platform', 'my_host', '--superspace', 'demo', '--networks', 3,
            '--max_drift', 20, '--output', tmp_path / 'measured', '--data', data]
    code, out = script(*args, '--minutes', 0.01)
    assert code == 2 and 'error: my_host: too little was measured' in out and not data.exists()
    code, out = script(*args, '--minutes', 0.4, '--resume')
    assert code == 0, out
    assert sorted(os.listdir(data / 'my_host')) == ['blocks.npz', 'model.npz', 'report.md', 'validation.png']
    assert 'Spearman' in (data / 'my_host' / 'report.md').read_text()
    table, _ = tables.load_platform(str(data / 'my_host'))
    assert set(table) == set(space_blocks('demo'))
    code, out = script(*args)
    assert code == 2 and '--force' in out
