"""The house rules that a machine can check: imports point one way, scripts end in two lines and say what they take."""
import argparse
import ast
import glob
import importlib
import os
import subprocess
import sys

import pytest

from .conftest import ROOT

# a package may import itself and what stands before it
ORDER = [('errors', 'original'), ('files', 'cli', 'optional'), ('figures', 'history', 'settings'), ('search_space',),
         ('modeling',), ('latency', 'training'), ('evolution', 'latency_predictor'), ('block_kd',), ('zoo',),
         ('subnets',), ('deploy',), ('pipeline',)]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MODULES = sorted(glob.glob(os.path.join(ROOT, 'modules', '**', '*.py'), recursive=True))
SCRIPTS = sorted(glob.glob(os.path.join(ROOT, '*.py')) + glob.glob(os.path.join(ROOT, '*_tools', '*.py'))
                 + glob.glob(os.path.join(ROOT, 'data', 'make', '*.py')))


def _imports(path):
    """Absolute names of everything a module imports, at any depth of the file."""
    package = os.path.relpath(os.path.dirname(path), ROOT).split(os.sep)
    with open(path, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = '.'.join(base + ([node.module] if node.module else []))
            yield module
            yield from (f'{module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: os.path.relpath(path, ROOT))
def test_imports_point_one_way(path):
    parts = os.path.relpath(path, ROOT)[:-3].split(os.sep)
    own = parts[1]
    for name in _imports(path):
        bits = name.split('.')
        if bits[0] != 'modules' or len(bits) < 2 or bits[1] in ('ROOT', 'usable_cores'):
            continue
        if own == '__init__':
            pytest.fail(f'modules/__init__.py imports {name}')
        assert bits[1] in LEVEL, f'{name} has no place in the house'
        allowed = LEVEL[bits[1]] < LEVEL[own] or bits[1] == own
        assert allowed, f'{own} imports {name}'
    if own == 'search_space':
        assert not {name.split('.')[0] for name in _imports(path)} & {'torch', 'numpy', 'timm'}


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: os.path.relpath(path, ROOT))
def test_scripts_end_in_two_lines(path):
    with open(path, encoding='utf-8') as f:
        text = f.read()
    tree = ast.parse(text)
    assert os.path.basename(path) in ast.get_docstring(tree), 'the docstring has a command that runs'
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} >= {'get_args', 'main'}
    assert text.rstrip().split('\n')[-2:] in (
        ["if __name__ == '__main__':", '    run(main, get_args)'],
        ["if __name__ == '__main__':", '    cli.run(main, get_args)'])


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: os.path.relpath(path, ROOT))
def test_help_shows_an_example_and_defaults(path, monkeypatch, capsys):
    """And every option has help."""
    name, parsers = os.path.relpath(path, ROOT), []
    monkeypatch.setattr(sys, 'argv', [path, '--help'])
    monkeypatch.setattr(argparse.ArgumentParser, 'print_help', lambda self, show=argparse.ArgumentParser.print_help: (
        parsers.append(self), show(self)))
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name[:-3].replace(os.sep, '.')).get_args()
    out, err = capsys.readouterr()
    assert end.value.code is None or end.value.code == 0, err
    assert f'python {name}' in out.replace('python -m torch.distributed.launch --nproc_per_node=4', 'python')
    assert '(default: ' in out and not err
    assert [action.dest for action in parsers[0]._actions if not action.help] == []


def test_the_core_does_without_optional_packages(tmp_path):
    """Nor do curves load TensorFlow, which TensorBoard would import where it is: torchvision after it crashes."""
    code = ('import sys; from modules.training.log import curves; '
            f'curves({str(tmp_path)!r}).close(); import torchvision, eval_supernet, search_block_kd, modules.zoo; '
            'print(sorted(set(sys.modules) & {"tensorflow", "nn_meter", "onnxruntime", "onnx"}))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == '[]', done.stderr
    assert os.listdir(tmp_path)
