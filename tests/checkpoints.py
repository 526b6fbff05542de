"""Supernet checkpoints as published: foreign objects, `module.` prefixes, numpy scalars. And calls of scripts."""
import atexit
import functools
import os
import pathlib
import shutil
import sys
import tempfile
import types

import numpy as np
import torch

from modules.cli import run
from modules.modeling.ops.lsq_plus import quantised_ops, set_quant_mode
from modules.modeling.supernet import Supernet

VNNI = 'onnxw-151122-023231'


def random_supernet(encoding, num_classes, quant=False):
    """A seeded random Supernet; quant: in int8, with LSQ+ scales."""
    torch.manual_seed(0)
    supernet = Supernet.build_from_str(encoding, num_classes)
    if quant:
        for op in quantised_ops(set_quant_mode(supernet)):
            op.initialize_scales(torch.tensor([-1.0, 5.0]))
    return supernet


def write_supernet(path, encoding, num_classes, quant=False):
    """Write a random supernet in the published format; its args end the process if they are unpickled as such."""
    supernet = random_supernet(encoding, num_classes, quant)
    module = types.ModuleType('original_repository')
    exec('import os\ndef make(): os._exit(99)\n'
         'class Args:\n    def __reduce__(self): return make, ()\n', module.__dict__)
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.modules[module.__name__] = module
    try:
        state = {f'module.{key}': tensor for key, tensor in supernet.state_dict().items()}
        torch.save({'epoch': 3, 'args': module.Args(), 'best_acc': np.float64(71.5), 'state_dict': state,
                    'optimizer': {}, 'lr_scheduler': None}, path)
    finally:
        del sys.modules[module.__name__]
    return supernet


@functools.cache
def published_root():
    """<root>/spaceevo@vnni/{checkpoint,lsq}.pth with random weights, made once."""
    root = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for name, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(root / 'spaceevo@vnni' / name, VNNI, 1000, quant)
    return root


def call(script, monkeypatch, *args):
    """main() of an imported script as its command line would; its SystemExit code, 0 without one."""
    monkeypatch.setattr(sys, 'argv', [script.__name__ + '.py', *map(str, args)])
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        run(script.main, script.get_args)
    except SystemExit as end:
        return end.code
    finally:                                        # what measures stays on one core
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads(threads)
    return 0


def fails(script, monkeypatch, capsys, said, *args):
    """The script ends with one line on stderr that says `said`, and exit code 2."""
    assert call(script, monkeypatch, *args) == 2
    last = capsys.readouterr().err.strip().split('\n')[-1]
    assert 'error: ' in last and said in last, last
