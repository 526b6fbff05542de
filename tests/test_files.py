"""Files that are whole or not there, and what killed writers leave."""
import os
import subprocess
import sys
import time

import pytest

from modules import files
from modules.errors import UserError
from modules.files import atomic_path, write_text

from .conftest import ROOT


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    write_text(tmp_path / 'sub' / 'a.txt', 'one')
    with pytest.raises(RuntimeError), atomic_path(tmp_path / 'sub' / 'a.txt') as temporary:
        assert temporary.endswith('a.txt') and os.path.dirname(temporary) == str(tmp_path / 'sub')
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write('half')
        raise RuntimeError
    assert (tmp_path / 'sub' / 'a.txt').read_text() == 'one' and os.listdir(tmp_path / 'sub') == ['a.txt']


def test_the_next_save_removes_what_a_killed_one_left_an_hour_ago(tmp_path):
    old, new, others = (tmp_path / name for name in ('.tmp-1@a.pth', '.tmp-2@a.pth', '.tmp-3@ba.pth'))
    for leftover in (old, new, others):
        leftover.write_text('half')
    for leftover in (old, others):
        os.utime(leftover, (time.time() - 2 * 3600,) * 2)
    write_text(tmp_path / 'a.pth', 'whole')
    assert not old.exists() and new.exists() and others.exists() and (tmp_path / 'a.pth').read_text() == 'whole'


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
