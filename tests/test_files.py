"""Files that are whole or not there, and what killed writers leave."""
import os
import subprocess
import sys
import time

import pytest

from modules import files
from modules.errors import UserError
from modules.files import Journal, atomic_path, write_text

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


# Journals

def _numbers(path, settings=None, resume=True):
    return Journal(str(path), {'seed': 0} if settings is None else settings, int, resume, otherwise='remove it')


def test_a_journal_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / 'numbers'
    with _numbers(path) as journal:
        for number in (3, 4):
            journal.append(number)
    whole = path.read_bytes()
    assert whole == b'# {"seed": 0}\n3\n4\n'
    for cut, entries in ((0, []), (5, []), (14, []), (15, []), (16, [3]), (17, [3]), (18, [3, 4])):
        path.write_bytes(whole[:cut])
        with _numbers(path) as journal:
            assert journal.entries == entries
            for number in (3, 4)[len(entries):]:
                journal.append(number)
        assert path.read_bytes() == whole
    with _numbers(path, resume=False) as journal:
        assert not journal.entries and journal.set_aside == str(tmp_path / 'numbers_old')
    assert (tmp_path / 'numbers_old').read_bytes() == whole


@pytest.mark.parametrize('content, line', [
    (b'# {"seed": 1}\n', 'numbers: made with seed 1, not 0; use that, or remove it'),
    (b'# {"seed": 0, "more": 2}\n', 'numbers: made with more 2, not None'),
    (b'3\n4\n', 'numbers: does not begin with what it depends on'), (b'\xff\x00', 'does not begin with'),
    (b'# [0]\n', 'does not begin with'), (b'# {"seed": 0}\n3\nx\n4\n', "numbers:3: not a line of this run: 'x'"),
    (b'# {"seed": 0}\n\xff\n', 'numbers:2: not a line'), (b'# {"seed": 0}\n\n3\n', 'numbers:2: not a line'),
])
def test_another_or_a_damaged_journal_is_refused_and_left_as_it_is(tmp_path, content, line):
    path = tmp_path / 'numbers'
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        _numbers(path)
    assert line in str(error.value) and '\n' not in str(error.value)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ['numbers']
