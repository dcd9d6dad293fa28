"""Locks of core: who holds one is named, and a process that is killed frees it."""
import subprocess
import sys
from contextlib import contextmanager

import pytest
from filelock import FileLock, Timeout

from kdocr.core import TemporaryFailure, try_lock, wait_lock

HOLDS = '''
import sys
from pathlib import Path
from kdocr.core import try_lock, wait_lock
with (try_lock(Path(sys.argv[1])/'.lock', 'training') if sys.argv[2] == 'try' else wait_lock(Path(sys.argv[1]))):
    print('in', flush=True)
    input()'''


@contextmanager
def holder(folder, how):
    "Another process that holds the folder's lock."
    with subprocess.Popen([sys.executable, '-c', HOLDS, folder, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline() == 'in\n'
        try: yield p
        finally: p.kill()


def test_the_holder_is_named_and_a_kill_frees_the_lock(tmp_path):
    with holder(tmp_path, 'try') as other:
        for _ in range(2): # trying took nothing from it
            with pytest.raises(TemporaryFailure, match=rf'{tmp_path}: another process is at work on this run \(training, pid {other.pid} on '):
                with try_lock(tmp_path/'.lock', 'second'): pass
    with try_lock(tmp_path/'.lock', 'third'): assert (tmp_path/'.lock.holder').read_text().startswith('third, pid ')


def test_an_error_inside_frees_the_lock(tmp_path):
    for lock in (lambda: try_lock(tmp_path/'.lock', 'a'), lambda: wait_lock(tmp_path)):
        with pytest.raises(ZeroDivisionError):
            with lock(): 1/0
    with try_lock(tmp_path/'.lock', 'b'): pass


def test_a_lock_without_a_name_and_one_that_is_waited_for(tmp_path, capsys):
    with holder(tmp_path, 'wait') as other:
        with pytest.raises(TemporaryFailure, match='it has not written its name yet'):
            with try_lock(tmp_path/'.lock', 'second'): pass
        with pytest.raises(Timeout): FileLock(tmp_path/'.lock').acquire(timeout=0)
        other.stdin.close() # it ends by itself, after we began to wait or before
        with wait_lock(tmp_path): pass
    with wait_lock(tmp_path/'new'/'folder'): assert (tmp_path/'new'/'folder').is_dir()


def test_a_full_disk_takes_the_name_and_not_the_lock(tmp_path, monkeypatch):
    from pathlib import Path
    def full(*a, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    with try_lock(tmp_path/'.lock', 'first'):
        with pytest.raises(TemporaryFailure):
            with try_lock(tmp_path/'.lock', 'second'): pass
