"""Scripts run as users run them: plain, under torchrun and torch.distributed.launch, and killed with SIGKILL."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from .conftest import ROOT


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def command(script, *args, ranks=1, launcher='torch.distributed.launch'):
    """The command line of a script; launcher: torch.distributed.launch, or torch.distributed.run (torchrun)."""
    launch = ['-m', launcher, f'--nproc_per_node={ranks}', f'--master_port={free_port()}'] if ranks > 1 else []
    return [sys.executable, *launch, os.path.join(ROOT, script), *map(str, args)]


def family(pid):
    """The process and all its descendants: a launcher's ranks are process groups of their own."""
    try:
        with open(f'/proc/{pid}/task/{pid}/children', encoding='ascii') as f:
            children = f.read().split()
    except FileNotFoundError:
        children = []
    return [pid] + [member for child in children for member in family(int(child))]


def run_script(script, *args, ranks=1, launcher='torch.distributed.launch', kill_when=None, threads='1', code=0,
               cwd=None):
    """Output of a script that has to end with `code`; SIGKILLed as soon as the file `kill_when` is there."""
    env = {**os.environ, 'OMP_NUM_THREADS': threads}
    with subprocess.Popen(command(script, *args, ranks=ranks, launcher=launcher), env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, cwd=cwd) as process:
        if kill_when:
            while process.poll() is None and not os.path.exists(kill_when):
                time.sleep(0.01)
            for pid in family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        output = process.communicate()[0]
    if kill_when:
        assert process.returncode == -signal.SIGKILL, f'it ended before it was killed: {output}'
    else:
        assert process.returncode == code, (process.returncode, output)
    return output
