"""What the hardening tests share: valid runs of every script, and what a script does with what it must refuse."""

import atexit
import contextlib
import functools
import importlib
import io
import os
import pathlib
import random
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from typing import NamedTuple

import torch

from modules.block_kd.lut import LutRow, write_block_lut
from modules.cli import run
from modules.search_space.encoding import format_sub_stage, parse_supernet, sub_stage_blocks
from modules.search_space.sampling import min_subnet, sample_sub_stage
from modules.search_space.superspace import get_superspace

from .checkpoints import VNNI, write_supernet

DIGITS = '--dataset digits --num_workers 0 --valid_size 16'
CPU = '--device cpu'
DEMO = '--superspace demo --supernet_choice 222-111'
BLOCKS = f'--superspace demo --teacher_arch efficientnet-lite0 --stage_list stage1_0 {DIGITS} {CPU}'
SHORT_KD = f'{BLOCKS} --max_steps 1 --num_epochs 1 --train_batch_size 4 --num_calib_batches 1 --num_valid_batches 1'
SHORT_EVALUATION = f'--num_calib_batches 1 --num_eval_images 8 --batch_size 8 {DIGITS} {CPU}'
TEACHER = '--teacher_checkpoint_path {in}/teachers/efficientnet_lite0/checkpoint.pth'
MODELS = '--input {in}/input.csv --model_path {out}'

# {name: (script, arguments)} of runs that end well, in an order in which each finds what it needs below {in}
RUNS = {
    'teacher': (
        'lsq_finetune_teacher',
        '--teacher_arch efficientnet-lite0 --weights random --from_teacher --max_steps 1 '
        f'--image_size 32 --train_batch_size 2 --num_eval_images 2 --output_path {{out}} {DIGITS} {CPU}',
    ),
    'block_kd': ('train_block_kd', f'{SHORT_KD} --teacher_weights random --output_path {{out}}'),
    'lsq_block_kd': ('lsq_block_kd', f'{SHORT_KD} {TEACHER} --output_path {{out}} --from_scratch'),
    'lut': (
        'eval_block_kd',
        f'{BLOCKS} {TEACHER} --checkpoint_path {{in}}/block_kd --output_path {{out}} --hw_list 32 '
        '--num_samples_per_stage 1 --calib_batch_size 4 --eval_batch_size 4 --num_calib_batches 1 '
        '--num_eval_batches 1 --width_window_filter 0 --num_threads 1',
    ),
    'spaces': (
        'search_block_kd',
        '--superspace demo --latency_constraint 2 --lut_path {in}/luts --output_dir {out} '
        '--num_spaces 3 --population_size 2 --parent_sample_size 1',
    ),
    'choices': (
        'search_block_kd',
        '--superspace demo --latency_constraint 2 --lut_path {in}/luts --output_dir {out} --supernet_choices 222-111',
    ),
    'supernet': ('train_supernet', f'--config-file {{in}}/tiny.yaml {DEMO} --output_path {{out}} {DIGITS} {CPU}'),
    'lsq_supernet': (
        'train_supernet',
        f'--config-file {{in}}/tiny.yaml {DEMO} --output_path {{out}} {DIGITS} {CPU} --quant_mode --from_scratch',
    ),
    'subnets': (
        'search_subnet',
        f'{DEMO} --latency_constraint 1 --latency_delta 0.5 --population_size 2 '
        '--num_rounds 1 --num_mutations 1 --num_crossovers 1 --num_valid_images 8 --num_threads 1 '
        f'--checkpoint_path {{in}}/supernets --output_path {{out}} {SHORT_EVALUATION}',
    ),
    'latency': ('eval_supernet', f'{DEMO} --mode lat --output_path {{out}} --subnet_choice min'),
    'distribution': ('eval_supernet', f'{DEMO} --mode lat --output_path {{out}} --num_samples 3'),
    'accuracy': (
        'eval_supernet',
        f'{DEMO} --mode acc --resume {{in}}/supernets --output_path {{out}} --subnet_choice min {SHORT_EVALUATION}',
    ),
    'published': (
        'eval_specific_net',
        '--model_name SEQnet@vnni-A0 --checkpoint_path {in}/published --output_path {out} '
        f'{SHORT_EVALUATION} --batch_size 2 --num_eval_images 2',
    ),
    'downstream': (
        'downstream_cls',
        '--superspace demo --supernet_choice 222-111 --subnet_name min --learning_rate 0.01 '
        '--weight_decay 0.00001 --num_epochs 1 --max_steps 1 --batch_size 8 --num_eval_images 8 '
        f'--num_calib_batches 1 --checkpoint_path {{in}}/supernets --output_path {{out}} {DIGITS} {CPU}',
    ),
    'export': (
        'onnx_tools.export_onnx',
        f'{MODELS} --checkpoint_path {{in}}/supernets --quant_mode --batch_size 8 --num_calib_batches 1 {DIGITS}',
    ),
    'random_export': ('onnx_tools.export_onnx', f'{MODELS} --skip_weights'),
    'eval_onnx': (
        'onnx_tools.eval_onnx',
        f'{MODELS} --checkpoint_path {{in}}/supernets --quant_mode --batch_size 8 '
        f'--num_calib_batches 1 --num_eval_images 8 {DIGITS}',
    ),
    'benchmark': ('onnx_tools.benchmark', f'{MODELS} --warmup 1 --runs 1'),
}
# runs that write where others read
PLACES = {
    'teacher': 'teachers',
    'block_kd': 'block_kd/demo',
    'lsq_block_kd': 'block_kd/demo',
    'supernet': 'supernets',
    'lsq_supernet': 'supernets',
}


LONGEST = 30  # seconds of a run


def _hang(*_):
    raise RuntimeError('the script does not end')


class Outcome(NamedTuple):
    """How a script ended: exit code, what it printed, and what it changed below the world's folder."""

    code: int
    out: str
    err: str
    changed: list


class World:
    """A folder of valid inputs ({in}), a place for outputs ({out}), and the ways to run scripts on them."""

    def __init__(self, root):
        self.root = root
        self.inputs, self.out = root / 'in', root / 'out'
        self.inputs.mkdir()

    def arguments(self, text, out=None):
        """Words of a command line with the placeholders {in} and {out}."""
        return [
            word.replace('{in}', str(self.inputs)).replace('{out}', str(out or self.out))
            for word in (shlex.split(text) if isinstance(text, str) else text)
        ]

    def tree(self):
        """{path: (bytes, time of the last write)} of everything below the root but lock files."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            found.update({os.path.join(folder, name): 'folder' for name in folders})
            for name in (name for name in files if not name.endswith('.lock')):
                stat = os.stat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = stat.st_size, stat.st_mtime_ns
        return found

    def attempt(self, script, arguments, out=None):
        """Outcome of a script (its module's name) with these arguments, run in this process."""
        before, folder, argv = self.tree(), os.getcwd(), sys.argv
        affinity, state = os.sched_getaffinity(0), torch.get_rng_state()
        out_text, err_text, code = io.StringIO(), io.StringIO(), 0
        module = importlib.import_module(script)
        sys.argv = [script.replace('.', '/') + '.py', *self.arguments(arguments, out)]
        os.chdir(self.root)
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(LONGEST)
        torch.manual_seed(0)                        # as in a process of its own: of random teachers
        try:
            with contextlib.redirect_stdout(out_text), contextlib.redirect_stderr(err_text):
                run(module.main, module.get_args)
        except SystemExit as end:
            code = end.code
        except Exception:  # a bug, or a user error that nobody foresaw
            code = 1
            err_text.write(traceback.format_exc())
        finally:
            signal.alarm(0)
            os.chdir(folder)
            sys.argv = argv
            os.sched_setaffinity(0, affinity)
            torch.set_rng_state(state)
        after = self.tree()
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        return Outcome(code, out_text.getvalue(), err_text.getvalue(), changed)

    def base(self, name, more='', out=None):
        """Outcome of a run of RUNS with more arguments, which win over its own."""
        script, arguments = RUNS[name]
        return self.attempt(script, self.arguments(arguments, out) + self.arguments(more, out), out)


def every(reader, others, damages, *few):
    """Cases: every damage where one reader meets it, and every other reader of the same files with a few."""
    return [(reader, damage) for damage in damages] + [
        (other, damage) for other in others if other != reader for damage in few]


def short(value):
    """The name of a case."""
    return ascii(value)[:28]


def refused(outcome, *culprits):
    """Assert that a script has ended as it has to: one error line that names the culprits, code 2, nothing written."""
    lines = outcome.err.strip().split('\n')
    assert 'Traceback' not in outcome.err and outcome.code == 2, f'code {outcome.code}\n{outcome.err[-3000:]}'
    assert 'error: ' in lines[-1], outcome.err[-2000:]
    assert sum('error: ' in line for line in lines) == 1, outcome.err[-2000:]
    for culprit in culprits:
        assert culprit in lines[-1], f'{culprit!r} is not named: {lines[-1]}'
    assert len(lines[-1]) < 1500, f'a line of {len(lines[-1])} characters'
    assert not outcome.changed, f'written: {outcome.changed}; {lines[-1]}'


@functools.cache
def world():
    """The World, made once for all tests: data, tables, then RUNS, each of which has to end well."""
    root = pathlib.Path(tempfile.mkdtemp(prefix='hardening-'))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    made = World(root)
    supernet = parse_supernet('demo-222-111')
    (made.inputs / 'input.csv').write_text(f'demo,222-111,{min_subnet(supernet)}\n')
    (made.inputs / 'tiny.yaml').write_text(
        'epochs: 1\nwarmup_epochs: 0.1\nbase_lr: 0.01\nbatch_size_per_gpu: 8\nmax_steps: 1\nnum_valid_images: 8\n'
        'num_calib_batches: 1\nnum_arch_training: 2\naugment: none\nvalid_size: 16\n'
    )
    write_luts(made.inputs / 'luts' / 'demo')
    for name in RUNS:
        if name == 'published':
            write_supernet(made.inputs / 'published' / 'spaceevo@vnni' / 'checkpoint.pth', VNNI, 10)
        place = made.inputs / PLACES.get(name, f'runs/{name}')
        outcome = made.base(name, out=place)
        assert outcome.code == 0, f'{name}: {outcome.err}'
    return made


def write_luts(folder):
    """Block LUTs of the demo space with random losses."""
    space, rng = get_superspace('demo'), random.Random(0)
    for lut_id in space.lut_ids():
        rows = []
        for hw in space.kd_resolutions * 3:
            blocks, cin, _ = sample_sub_stage(space, lut_id, rng, [hw])
            size = -(-hw // space.input_stride(lut_id.split('_')[0]))
            blocks = sub_stage_blocks(space, lut_id, format_sub_stage(blocks), (1, cin, size, size))
            rows.append(LutRow(blocks, rng.uniform(0.1, 0.9), 1.0, 0.1, rng.uniform(0.1, 0.3)))
        write_block_lut(folder / f'{lut_id}.csv', rows)
