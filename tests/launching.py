"""Scripts run as users run them, in processes of their own: plain, on several ranks, and killed with SIGKILL.

run_script() forks them from a server that has imported torch, which takes seconds; launch() takes the real launchers.
"""
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

import torch

from .conftest import ROOT

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['torch', 'torchvision', 'timm', 'matplotlib.figure', 'sklearn.datasets', 'scipy.stats',
                               'torch.utils.tensorboard'])
LONGEST = 1200                  # seconds of a run, on a busy machine


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def launch(launcher, script, *args, ranks=2, cwd=None, code=0):
    """Output of a script on ranks of torch.distributed.launch, or of torch.distributed.run (torchrun)."""
    done = subprocess.run([sys.executable, '-m', launcher, f'--nproc_per_node={ranks}', f'--master_port={free_port()}',
                           os.path.join(ROOT, script), *map(str, args)], cwd=cwd, text=True, check=False,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout
    return done.stdout


def _be_script(argv, environment, output, cwd):
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)        # which jobs in the background ignore
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    torch.set_num_threads(1)
    os.chdir(cwd)
    runpy.run_path(argv[0], run_name='__main__')


def run_script(script, *args, ranks=1, kill_when=None, kill_by=signal.SIGKILL, victims=slice(None), code=0, cwd=None):
    """Output of a script, all of whose ranks have to end with `code`; they start as torch.distributed.launch does it.

    kill_when: its `victims` among the ranks get the signal `kill_by` as soon as this file is there, or this function
    says so; SIGKILL ends them without a code.
    `{rank}` in an argument is the rank's number: ranks of several machines have folders of their own.
    """
    argv, folder = [os.path.join(ROOT, script), *map(str, args)], cwd or os.getcwd()
    port = free_port()
    ready = kill_when if callable(kill_when) else lambda: os.path.exists(kill_when)
    with tempfile.NamedTemporaryFile('r', encoding='utf-8', errors='replace') as output:
        processes = []
        for rank in range(ranks):
            place = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': ranks,
                     'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port} if ranks > 1 else {}
            environment = {name: str(value) for name, value in place.items()}
            words = [word.replace('{rank}', str(rank)) for word in argv]
            words += [f'--local-rank={rank}'] * (ranks > 1)
            processes.append(SERVER.Process(target=_be_script, args=(words, environment, output.name, folder)))
            processes[-1].start()
        try:
            if kill_when:
                while not ready() and any(process.is_alive() for process in processes):
                    time.sleep(0.01)
                for process in processes[victims]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, kill_by)
            end = time.time() + LONGEST
            while any(process.is_alive() for process in processes) and time.time() < end:
                time.sleep(0.01)
                if not kill_when and any(process.exitcode for process in processes):
                    end = min(end, time.time() + 20)            # of the others, which wait for this one
        finally:
            for process in processes:
                process.kill()
                process.join()
        text = output.read()
    codes = [process.exitcode for process in processes]
    if kill_when:
        wanted = -signal.SIGKILL if kill_by == signal.SIGKILL else code
        assert set(codes[victims]) == {wanted}, f'{codes}: it ended before the signal, or otherwise: {text}'
        assert all(codes), text
    else:
        assert set(codes) == {code}, (codes, text)
    return text
