"""The shell commands of README.md and docs/*.md, and how a test shortens each script: by more flags only."""
import glob
import importlib.util
import os
import re
import shlex
from typing import NamedTuple

from .conftest import ROOT

PAGES = [os.path.join(ROOT, 'README.md'), *sorted(glob.glob(os.path.join(ROOT, '*', '*.md')))]
LOGS = sorted(glob.glob(os.path.join(ROOT, 'docs', 'log', '*.md')))     # of the past: their links are checked only
STARTS = ('python ', 'torchrun ', 'pip ', 'make ', 'apt-get ', 'nn-meter ', 'adb ', 'taskset ', 'git ')
BEFORE = re.compile(r'(?:taskset -c \d+ )?(?:torchrun|python -m torch\.distributed\.(?:launch|run)|python)'
                    r'(?: --nproc_per_node[= ]\d+)? ')
WAYS = ('--mode', '--superspace', '--plugin', '--quant_mode', '--network', '--supernet_choices', '--subnet_choice',
        '--skip_weights', '--report', '--adb', '--debug', '--from_teacher', '--init_block_kd', '--distill')

DATA = '--num_workers 0 --valid_size 4'
CPU = '--device cpu'
DIGITS = '--dataset digits'
KD = (f'--teacher_arch efficientnet-lite0 --max_steps 1 --num_epochs 1 --train_batch_size 2 --num_calib_batches 1 '
      f'--num_valid_batches 1 {DATA} {CPU}')
TEACHER = '--teacher_checkpoint_path checkpoints/block_kd/teacher_checkpoint/efficientnet_lite0/checkpoint.pth'
EVALUATION = f'--num_calib_batches 1 --num_eval_images 2 --batch_size 2 {DATA} {CPU}'
EXPORT = f'--batch_size 4 --num_calib_batches 1 {DATA} {DIGITS}'
ONE_BLOCK, SMALL = '--hw_list 64 --stage_list stage1_0', f'--hw_list 32 {DIGITS}'
MODELS = '--input input.csv --model_path checkpoints/models'
SPACES = '--num_spaces 12 --population_size 8 --parent_sample_size 4'

# {script: (flags that shorten it, {part of a command: more flags where it is there})}
SHORTER = {
    'train_block_kd.py': (KD, {'onnxw': ONE_BLOCK, 'fashion-mnist': SMALL}),
    'lsq_block_kd.py': (f'{KD} {TEACHER}', {'onnxw': ONE_BLOCK, 'fashion-mnist': SMALL}),
    'lsq_finetune_teacher.py': (f'--teacher_arch efficientnet-lite0 --max_steps 1 --train_batch_size 2 --image_size 32 '
                                f'--num_eval_images 2 --output_path checkpoints/teachers {DATA} {CPU} '
                                '--from_teacher',                           # the pictures have 3 classes
                                {'fashion-mnist': DIGITS}),
    'eval_block_kd.py': (f'--teacher_arch efficientnet-lite0 {TEACHER} --num_samples_per_stage 2 --calib_batch_size 2 '
                         f'--num_calib_batches 1 --eval_batch_size 2 --num_eval_batches 1 {DATA} {CPU}',
                         {'onnxw': '--hw_list 64 --platform onnx_lut', 'fashion-mnist': SMALL}),
    'search_block_kd.py': ('', {'--lut_path': SPACES, '--plugin': '--latency_constraint 100'}),
    'train_supernet.py': (f'--batch_size_per_gpu 2 --max_steps 1 --epochs 1 --num_valid_images 4 --num_calib_batches 1 '
                          f'{DATA} {CPU}', {'fashion-mnist': f'--output_path checkpoints/trained {DIGITS}',
                                           '--init_block_kd': '--init_steps 1'}),
    'search_subnet.py': (f'{EVALUATION} --population_size 2 --num_rounds 1 --num_mutations 1 --num_crossovers 1 '
                         '--num_valid_images 2', {'fashion-mnist': DIGITS, 'my_host': '--platform onnx_lut', '--plugin':
                                                  '--latency_constraint 5 --latency_delta 4.9 '
                                                  '--checkpoint_path checkpoints/trained'}),
    'eval_supernet.py': ('--num_samples 20', {'--mode acc': EVALUATION, 'my_host': '--platform onnx_lut',
                                              'fashion-mnist': DIGITS}),
    'eval_specific_net.py': (EVALUATION, {}),
    'downstream_cls.py': (f'--num_epochs 1 --max_steps 1 --learning_rate 0.01 {EVALUATION}',
                          {'--dataset': DIGITS}),
    'onnx_tools/export_onnx.py': (f'{MODELS} {EXPORT} --report_images 2', {}),
    'onnx_tools/eval_onnx.py': (f'{MODELS} {EXPORT} --num_eval_images 4', {}),
    'onnx_tools/benchmark.py': (f'{MODELS} --warmup 1 --runs 2', {}),
    'onnx_tools/export_lut.py': ('--platform onnx_lut', {}),
    'onnx_tools/import_lut.py': ('--epochs 1 --data platforms --force', {}),
    'benchmarks/make_crops.py': ('--sources dataset --number 12 --size 32 --min_detail 0', {}),
}
# {script or a flag of it: why a test only parses it, or does not run it at all}
PARSED = {
    '--adb': 'needs a phone',
    '--trust_pickles': 'needs predictors registered with nn-Meter: tests/test_nn_meter.py',
    'onnx_tools/build_predictor.py': 'minutes of a quiet machine; tests/test_build_predictor.py',
    'tflite_tools/build_predictor.py': 'the same',
    'tflite_tools/export_tflite.py': 'needs ai-edge-litert: tests/test_deploy_commands.py, tests/test_tflite.py',
    'tflite_tools/eval_tflite.py': 'the same',
    'tflite_tools/benchmark.py': 'the same',
    'benchmarks/compare_lut.py': 'needs ../shared/reference',
    'data/make/latency.py': 'the same',
    'data/make/block_lut.py': 'the same',
    'benchmarks/compare_platforms.py': 'needs ../shared/reference',
    'benchmarks/adapted_platforms.py': 'needs measurements: tests/test_adapted_platforms.py',
    'benchmarks/lut_reuse.py': 'measures for minutes, and needs the b5 teacher',
    'benchmarks/supernet_step.py': 'measures for minutes',
    'benchmarks/supernet_start.py': 'trains for minutes',
    'benchmarks/onnx_int8.py': 'measures for minutes',
    'benchmarks/onnx_blocks.py': 'measures for minutes',
    'benchmarks/openvino_operators.py': 'needs OpenVINO: tests/test_openvino.py',
    'benchmarks/demo_spaces.py': 'trains for minutes, after a demo',
    'pipeline.py': 'tests/test_pipeline.py',
    'onnx_tools/compare_baselines.py': 'measures for minutes',
    'onnx_tools/predict.py': 'tests/test_predict.py',
    'tflite_tools/predict.py': 'the same code',
}
IGNORED = {'-m pytest': 'this'}


def load_script(name):
    """A script by its path, imported."""
    spec = importlib.util.spec_from_file_location(name[:-3].replace('/', '_'), os.path.join(ROOT, name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Command(NamedTuple):
    """One documented command: the page, the script (or `-m module`) and its words."""
    page: str
    text: str
    script: str
    words: tuple

    @property
    def form(self):
        """What a run of it shows: the script and the flags that choose between ways, with hyperspace and mode."""
        chosen = {f'{flag} {value}' if flag in ('--mode', '--superspace') else flag
                  for flag, value in zip(self.words, (*self.words[1:], '')) if flag in WAYS}
        return self.script, frozenset(chosen)

    def short(self):
        """Its words with the flags that shorten it."""
        always, where = SHORTER[self.script]
        text = ' '.join(self.words)
        return [*self.words, *always.split(),
                *(word for words, more in where.items() if words in text for word in more.split())]

    def parsed_only(self):
        """Why it is not run, None where it is."""
        return next((PARSED[word] for word in (self.script, *self.words) if word in PARSED), None)


def parse_command(line, page=''):
    """Command of a line, None of a program that is not ours."""
    words = shlex.split(BEFORE.sub('', line, count=1)) if BEFORE.match(line) else None
    if not words:
        return None
    count = 2 if words[0] == '-m' else 1
    return Command(page, line, ' '.join(words[:count]), tuple(words[count:]))


def shell_lines(text):
    """Commands of a page: of fenced and indented blocks, one by one, and of `python …` in the text."""
    blocks = [block for language, block in re.findall(r'^```(\w*)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
              if language in ('', 'sh', 'bash')]
    rest = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    blocks.append('\n'.join(line[4:] if line.startswith('    ') else '' for line in rest.split('\n')))
    for block in blocks:
        for line in re.sub(r'\\\n\s*', ' ', block).split('\n'):
            line = re.sub(r'\s+#.*', '', line.strip().removeprefix('$ '))
            if line.startswith(STARTS):
                yield line
    for span in re.findall(r'`([^`]+)`', re.sub(r'^    .*', '', rest, flags=re.MULTILINE)):
        span = ' '.join(span.split())
        if span.startswith(STARTS) and re.search(r'\S+\.py |-m ', span):
            yield span


def commands():
    """[Command] of all pages. `…` stands for the words of the first whole command of the script, <…> for max."""
    found, whole = [], {}
    for page in PAGES:
        with open(page, encoding='utf-8') as f:
            found += filter(None, (parse_command(line, os.path.relpath(page, ROOT)) for line in shell_lines(f.read())))
    for command in found:
        if '…' not in command.words:
            whole.setdefault(command.script, command.words)
    return [command._replace(words=tuple(
        part for word in command.words for part in
        (whole.get(command.script, ()) if word == '…' else ('max' if word.startswith('<') else word,))))
        for command in found]


def others():
    """Documented lines of other programs."""
    lines = []
    for page in PAGES:
        with open(page, encoding='utf-8') as f:
            lines += [line for line in shell_lines(f.read()) if parse_command(line) is None]
    return lines
