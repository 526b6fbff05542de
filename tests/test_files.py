"""Files that are whole or not there, and what killed writers leave."""
import os
import signal
import subprocess
import sys
import time

import pytest

from modules import files
from modules.errors import UserError
from modules.files import atomic_path, write_text

from .conftest import ROOT

KILLED = """
import os, signal, sys
from modules.files import atomic_path
with atomic_path(sys.argv[1]) as temporary, open(temporary, 'w') as file:
    file.write('half')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    write_text(tmp_path / 'sub' / 'a.txt', 'one')
    with pytest.raises(RuntimeError), atomic_path(tmp_path / 'sub' / 'a.txt') as temporary:
        assert temporary.endswith('a.txt') and os.path.dirname(temporary) == str(tmp_path / 'sub')
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write('half')
        raise RuntimeError
    assert (tmp_path / 'sub' / 'a.txt').read_text() == 'one' and os.listdir(tmp_path / 'sub') == ['a.txt']


def test_the_next_save_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / 'spaceevo@vnni.pth'
    done = subprocess.run([sys.executable, '-c', KILLED, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    write_text(tmp_path / 'vnni.pth', '')                   # another file
    write_text(tmp_path / 'pth', '')
    assert len(os.listdir(tmp_path)) == 3
    write_text(path, 'whole')
    assert sorted(os.listdir(tmp_path)) == ['pth', 'spaceevo@vnni.pth', 'vnni.pth']


def test_temporaries_of_the_living_and_of_elsewhere_stay(tmp_path):
    path, dead = tmp_path / 'a.pth', subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    living, elsewhere, old, odd = (tmp_path / name for name in (
        f'.tmp-{os.getppid()}@{files._place()}@a.pth', f'.tmp-{dead.pid}@host-1@a.pth',
        f'.tmp-{dead.pid}@host-2@a.pth', f'.tmp-x@{files._place()}@a.pth'))
    for leftover in (living, elsewhere, old, odd):
        leftover.write_text('half')
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    os.utime(odd, (two_days_ago, two_days_ago))
    with atomic_path(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
        file.write('whole')
        with atomic_path(tmp_path / 'b.pth') as other, open(other, 'w', encoding='utf-8'):
            assert os.path.exists(temporary)
    assert living.exists() and elsewhere.exists() and odd.exists() and not old.exists()
    assert path.read_text() == 'whole'


HOLDS = """
import sys, time
from modules.files import hold
hold(sys.argv[1])
print('held', flush=True)
time.sleep(600)
"""


def test_a_file_is_held_by_one_process_until_it_ends(tmp_path):
    path = str(tmp_path / 'new' / 'checkpoint.pth')
    with subprocess.Popen([sys.executable, '-c', HOLDS, path], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b'held\n'
        with pytest.raises(UserError, match='checkpoint.pth: another process is writing it'):
            files.hold(path)
        holder.kill()
    files.hold(path)
    files.hold(path)
