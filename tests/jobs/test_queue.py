"""Jobs that survive anything: kills at random moments, two commands at once, a full disk, odd names; each run is made once, and as if nothing had been."""
import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import nbformat
import pytest

from kdocr.core import KdocrError, is_locked, read_json, try_lock
from kdocr.jobs.queue import (_Batch, _JobFiles, DiskFull, Job, _Slot, JobState, _Progress, _JobProcess, disk_full, finished,
                              slots, run_jobs)
from kdocr.jobs.status import Status
from sweeping import COMMAND, at_work, command, notebook, plan, quick, undisturbed


def call(file, cores=2, **kw): return subprocess.run(command(file, cores), capture_output=True, text=True, timeout=300, **kw)


def gone(out):
    "Wait until nobody works there any more."
    for _ in range(300):
        if not any(at_work(out).values()): return True
        time.sleep(.1)


def test_places_share_the_cores_and_never_a_gpu():
    assert slots(None, [0, 1, 2], []) == [_Slot((0,), None), _Slot((1,), None), _Slot((2,), None)]
    assert slots(2, [0, 1, 2, 3], []) == [_Slot((0, 2), None), _Slot((1, 3), None)]
    assert slots(5, [0, 1], []) == [_Slot((), None)] * 5
    assert slots(None, [0, 1, 2, 3], ['0', '3']) == [_Slot((0, 2), '0'), _Slot((1, 3), '3')]
    assert [p.gpu for p in slots(8, list(range(8)), ['0', '1'])] == ['0', '1'] and len(slots(1, [0, 1], ['0', '1'])) == 1


class Here:
    "An executor that does a job at once, in this process."
    pause, lasting = 0, False
    def __init__(self): self.made = []
    def free(self): return [0]
    def present(self): return {}
    def stop(self, numbers): pass
    def clear(self, number): pass
    def submit(self, works, after=None):
        for w in works:
            self.made.append(w.job.name)
            try: w()
            except KdocrError: pass # a cluster would call it failed
        return [str(len(self.made))] * len(works)


def made(tmp_path, cell, meanwhile=lambda batch: None, retries=2):
    "One job whose notebook is `cell`, until it is over: its row, and how often it was started."
    batch = _Batch([Job('a', None, {}, trains=False)], tmp_path, notebook(tmp_path/'n.ipynb', cell, 'x = 1'), Here(), retries)
    while batch.open: batch.start(); batch.check(); meanwhile(batch)
    return batch.rows['a'], len(batch.executor.made)


@pytest.mark.parametrize('error', ["ZeroDivisionError('division by zero')", "RuntimeError('its kernel died; another process is at work on this run')"])
def test_what_a_cell_raised_is_not_tried_again_whatever_its_words(tmp_path, error):
    row, times = made(tmp_path, f'raise {error}')
    assert (row.state, times) == ('failed', 1) and row.error.startswith(f'n.ipynb, cell 1: {error.split("(")[0]}: ')


def test_a_dead_kernel_is_tried_again_and_not_for_ever(tmp_path):
    row, times = made(tmp_path, 'import os; os._exit(9)', retries=1)
    assert (row.state, times) == ('failed', 2) and row.error.endswith('(2 times)')
    row, times = made(tmp_path/'b', "import os\nfrom pathlib import Path\nif not Path('{0}').exists(): Path('{0}').write_text(''); os._exit(9)".format(tmp_path/'begun'))
    assert (row.state, times, row.tries) == ('finished', 2, 1)


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_the_batch(tmp_path, monkeypatch, code):
    with pytest.raises(DiskFull, match='a: n.ipynb, cell 1: OSError'): made(tmp_path, f"import os; raise OSError({code}, os.strerror({code}), 'last.pth')")
    def full(*a): raise OSError(code, os.strerror(code))
    monkeypatch.setattr('kdocr.jobs.notebooks._Log', full)
    with pytest.raises(DiskFull, match='cannot be written to'): made(tmp_path/'before it began', 'pass')
    assert disk_full(OSError(code, '')) and not disk_full(OSError(errno.EACCES, '')) and not disk_full(None)


@pytest.mark.parametrize('lock', ['.notebook.lock', '.lock'])
def test_a_folder_that_is_taken_is_waited_for(tmp_path, monkeypatch, lock):
    "By `kdocr run` or by a training without a notebook; the time until the next look is not waited for."
    (tmp_path/'a').mkdir()
    seen = []
    with ExitStack() as other:
        other.enter_context(try_lock(tmp_path/'a'/lock, 'by hand'))
        def meanwhile(batch):
            row = batch.rows['a']
            seen.append((row.state, row.taken, len(batch.executor.made)))
            row.later = 0
            if len(seen) == 3: other.close()
        row, times = made(tmp_path, 'pass', meanwhile)
    assert seen[:3] == [('elsewhere', True, 1)] * 3 and (row.state, times, row.tries) == ('finished', 2, 0)


def test_a_training_that_began_meanwhile_is_waited_for(tmp_path):
    "It came between our look at its lock and our first cell, which therefore failed."
    cell = f"""
import fcntl, os, time
from pathlib import Path
taken = Path({str(tmp_path/'taken')!r})
if not taken.exists():
    if not os.fork():
        os.setsid() # it is none of the kernel's
        lock = open({str(tmp_path/'a/.lock')!r}, 'a')
        fcntl.flock(lock, fcntl.LOCK_EX)
        taken.write_text(str(os.getpid()))
        time.sleep(60)
    while not (taken.exists() and taken.read_text()): time.sleep(.01)
    raise RuntimeError('somebody trains here')"""
    seen = []
    def meanwhile(batch):
        seen.append(batch.rows['a'].state)
        if len(seen) == 1: os.kill(int((tmp_path/'taken').read_text()), signal.SIGKILL)
        batch.rows['a'].later = 0
    row, times = made(tmp_path, cell, meanwhile)
    assert seen[0] == 'elsewhere' and (row.state, times, row.tries) == ('finished', 2, 0)


def test_the_summary_counts_states_and_estimates_the_time_left(tmp_path, monkeypatch, capsys):
    clock = [100.]
    monkeypatch.setattr('kdocr.jobs.queue.time.monotonic', lambda: clock[0])
    rows = [JobState(Job(f'run{i}', 10, {}), tmp_path) for i in range(30)]
    report = _Progress(rows)
    assert capsys.readouterr().out.endswith(' 0 of 30 finished, 30 waiting\n')
    rows[17].state, rows[23].state, rows[3].state = 'running', 'failed', 'finished'
    (tmp_path/'run3').mkdir()
    (tmp_path/'run3/scores.json').write_text('{}')
    (tmp_path/'run17').mkdir()
    (tmp_path/'run17/metrics.jsonl').write_text('{"step": 4, "val_exact_match": 0.25}\n')
    clock[0] += 8
    report.show()
    assert [l.split(' ', 1)[1] for l in capsys.readouterr().out.splitlines()] == ['run3: finished', 'run17: running', 'run23: failed'], 'each change once'
    report.show()
    assert capsys.readouterr().out == ''
    clock[0] += 61
    report.show()
    assert capsys.readouterr().out.endswith(' 1 of 30 finished, 1 running, 27 waiting, 1 failed, 22:40 left\n'), '14 steps in 69 s, 276 left' 


def test_work_that_is_done_is_left_alone_and_what_it_needs_is_waited_for(tmp_path):
    def ends(work): work(); return read_json(work.files.end)['state']
    file = notebook(tmp_path/'n.ipynb')
    (tmp_path/'a').mkdir(); (tmp_path/'a/scores.json').write_text('{}')
    assert ends(_JobProcess(Job('a', 1, {}), file, tmp_path)) == 'finished' and [p.name for p in (tmp_path/'a').iterdir()] == ['scores.json']
    b = _JobProcess(Job('b', 1, {}, 'c'), file, tmp_path, need=Job('c', 1, {}))
    assert ends(b) == 'waits' and not (tmp_path/'b').exists()
    with try_lock(b.files.lock, 'b'): assert ends(b) == 'held' and is_locked(b.files.lock)


def test_what_is_no_training_is_finished_where_its_status_says_so(tmp_path):
    file = notebook(tmp_path/'n.ipynb', 'print(word)', "word = ''")
    for n in 'ab': (tmp_path/n).mkdir()
    Status(tmp_path/'a').end('finished')
    (tmp_path/'b/status.json').write_text('{"state": "finished"') # damaged: written anew
    rows = run_jobs([Job(n, None, dict(word=n), trains=False) for n in 'ab'], tmp_path, file, 1)
    assert [r.state for r in rows.values()] == ['finished'] * 2 and finished(tmp_path/'b', False) and not (tmp_path/'a/n.ipynb').exists() and (tmp_path/'b/n.ipynb').exists()


@pytest.mark.slow
def test_a_failed_cell_is_not_tried_again_and_a_dead_kernel_is(tmp_path):
    file, out = plan(tmp_path/'größer, schöner', dict(good={}, broken=dict(broken=True), dies=dict(dies=True)))
    r = call(file, env=quick(tmp_path))
    assert r.returncode == 1, r.stderr
    said = {n: re.findall(rf'^\S+ {n}: (.*)$', r.stdout, re.M) for n in ('good', 'broken', 'dies')}
    assert said['good'] == ['running', f'finished, exact match {read_json(out/"good/scores.json")["val"]["exact_match"]:.1%}']
    assert said['broken'][0] == 'running' and said['broken'][1].startswith('failed: n.ipynb, cell 2: ZeroDivisionError: division by zero') and len(said['broken']) == 2
    assert said['dies'][0] == 'running' and re.match('running, try 2: n.ipynb.* its kernel died', said['dies'][1]) and said['dies'][2].startswith('finished')
    assert [(out/n/'begun').read_text() for n in said] == ['0\n', '0\n', '0\n1\n'], 'the second attempt goes on from the checkpoint'
    assert not list((out/'.sweep/jobs').glob('*submitted*'))[2:], 'what submitit keeps of those that went well is gone'


def test_a_run_that_another_process_holds_is_waited_for_and_said_so(tmp_path, capsys):
    file, lock = notebook(tmp_path/'n.ipynb'), _JobFiles(tmp_path, 'a').lock
    with ExitStack() as other:
        lock.parent.mkdir()
        other.enter_context(try_lock(lock, 'a'))
        def end(): (tmp_path/'a').mkdir(); (tmp_path/'a/scores.json').write_text('{}'); other.close()
        threading.Timer(.7, end).start()
        rows = run_jobs([Job('a', 1, {})], tmp_path, file, 1)
    said = capsys.readouterr().out
    assert rows['a'].state == 'finished' and 'a: elsewhere: another process is at work on it; waiting for it to end' in said and ': running' not in said


@pytest.mark.slow
def test_two_commands_at_once_make_each_run_once(tmp_path):
    file, out = plan(tmp_path, {f'r{i}': dict(seed=i) for i in range(4)})
    both = [subprocess.Popen(command(file, 1), stdout=subprocess.PIPE, text=True, env=quick(tmp_path)) for _ in range(2)]
    said = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert all((out/f'r{i}/begun').read_text() == '0\n' for i in range(4)), 'begun once each'
    assert all('4 of 4 finished' in s for s in said)


@pytest.mark.slow
def test_ctrl_c_stops_in_good_order_and_the_same_command_goes_on(tmp_path):
    file, out = plan(tmp_path, dict(long=dict(steps=100)))
    p = subprocess.Popen(command(file), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quick(tmp_path), start_new_session=True)
    while not (out/'long/checkpoints/last.npz').exists(): time.sleep(.05)
    os.killpg(p.pid, signal.SIGINT) # as a terminal does: to all of the group
    said = p.communicate(timeout=60)
    assert p.returncode == 130 and 'stopped by SIGINT; the same command goes on from here' in said[1] and 'long: stopped' in said[0]
    assert not any(at_work(out).values()) and not (out/'long/scores.json').exists() and 'KeyboardInterrupt' in (out/'long/n.ipynb').read_text()
    steps = len((out/'long/metrics.jsonl').read_text().splitlines())
    plan(tmp_path, dict(long=dict(steps=steps + 3)))
    assert call(file, env=quick(tmp_path)).returncode == 0
    assert (out/'long/scores.json').read_bytes() == undisturbed(tmp_path/'whole', steps=steps + 3)
    assert int((out/'long/begun').read_text().split()[1]) >= steps - 1


@pytest.mark.slow
def test_twenty_runs_that_are_killed_at_random_end_as_if_nothing_had_been(tmp_path):
    "Of the sweep, of the processes that carry its jobs, and of the kernels."
    file, out = plan(tmp_path, {f'r{i:02}': dict(seed=i) for i in range(20)})
    rng, env = random.Random(3), quick(tmp_path)
    victims = ['command', 'kernel', 'worker', 'controller'] * 3
    rng.shuffle(victims)
    killed, starts = [], 0
    while victims:
        p, starts = subprocess.Popen(command(file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env), starts + 1
        while victims and p.poll() is None:
            time.sleep(rng.uniform(.2, 1.5))
            there = dict(at_work(out), command=[p])[victims[0]]
            if not there or p.poll() is not None: continue
            rng.choice(there).kill()
            killed.append(victims.pop(0))
            if killed[-1] == 'command': break
        if p.poll() is None and killed[-1] != 'command': p.wait(300)
        else: p.wait(30)
        assert starts < 30, (victims, killed)
    last = call(file, env=env)
    assert last.returncode == 0, last.stdout[-3000:] + last.stderr[-3000:]
    assert gone(out), 'nobody is left behind'
    for i in range(20):
        run = out/f'r{i:02}'
        assert (run/'scores.json').read_bytes() == undisturbed(tmp_path/f'whole{i}', seed=i), 'bit for bit'
        assert [json.loads(l)['step'] for l in (run/'metrics.jsonl').read_text().splitlines()] == list(range(1, 7)), 'every step once'
        assert not list(run.rglob('*.tmp')) and nbformat.read(run/'n.ipynb', 4)
    before = {p: p.stat().st_mtime_ns for p in out.glob('r*/**/*')}
    assert call(file, env=env).returncode == 0 and before == {p: p.stat().st_mtime_ns for p in out.glob('r*/**/*')}, 'finished once'




@pytest.mark.slow
def test_a_full_disk_stops_all_and_the_same_command_goes_on_once_there_is_room(tmp_path):
    "On a disk of 4 MB that holds only some of these checkpoints beside a file of somebody else."
    disk = tmp_path/'disk'
    disk.mkdir()
    file, out = plan(tmp_path/'plan', {f'r{i}': dict(seed=i, ballast=.4, pace=0) for i in range(4)})
    file.write_text(file.read_text().replace(str(out), str(disk/'out')))
    run = f'{sys.executable} -c "$COMMAND" {file} 1'
    script = f'mount -t tmpfs -o size=4m tmpfs {disk} && head -c 2200000 /dev/zero > {disk}/filler && {run}; echo "= $?"; rm {disk}/filler; {run}; echo "= $?"; cat {disk}/out/r*/scores.json | sha256sum'
    r = subprocess.run(['unshare', '--mount', '--map-root-user', 'sh', '-c', script], capture_output=True, text=True, env=dict(quick(tmp_path), COMMAND=COMMAND), timeout=300)
    if 'unshare' in r.stderr or 'mount:' in r.stderr: pytest.skip('this system lends no disk to fill')
    assert re.findall(r'= (\d+)', r.stdout) == ['75', '0'], r.stdout + r.stderr
    first, second, _ = re.split(r'= \d+\n', r.stdout)
    assert f'kdocr: {disk}/out: no space left on the disk' in r.stderr and 'give the same command again' in r.stderr and r.stderr.count('kdocr: ') == 1
    assert re.search(r'[1-3] of 4 finished', first.splitlines()[-1]) and '4 of 4 finished' in second and 'Traceback' not in r.stderr
    assert hashlib.sha256(b''.join(undisturbed(tmp_path/f'w{i}', seed=i, ballast=.4) for i in range(4))).hexdigest() in r.stdout


def test_a_terminal_gets_a_bar_below_the_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.stderr.isatty', lambda: True)
    rows = [JobState(Job('a', 10, {}), tmp_path)]
    report = _Progress(rows)
    (tmp_path/'a').mkdir()
    (tmp_path/'a/scores.json').write_text('{"test": {"exact_match": 0.5}}')
    rows[0].state = 'finished'
    report.show(last=True)
    said = capsys.readouterr()
    assert '10/10' in said.err and [l.split(' ', 1)[1] for l in said.out.splitlines()] == ['a: finished, exact match 50.0%', '1 of 1 finished']
