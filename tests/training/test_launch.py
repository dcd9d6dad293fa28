"""Several ranks started from one process: what they cannot share is refused, a kill or a stop costs nothing but time, and no rank outlives who started it."""
import os
import random
import signal
import subprocess
import sys
import threading
import time

import nbformat
import psutil
import pytest
import yaml

from kdocr.training import launch
from kdocr.jobs import notebooks
from kdocr.cli import main
from kdocr.core import KdocrError, TemporaryFailure, Stopped, read_json
from kdocr.training.launch import RankKilled, _RankExit, check_ranks, explain_exit, train_ranks
from kdocr.jobs.queue import _Slot, slots
from kdocr.jobs.notebooks import _outcome, read_status
from kdocr.training.run_folder import RunFolder, load_checkpoint
from kdocr.jobs.sweep import _config_of, make_sweep
from small_runs import SMALL, drawn, same_end, small

TRAIN = dict(mode='teacher', steps=40, checkpoint_every=4, eval_every=16, log_every=1)


@pytest.mark.parametrize('ranks, values, said', [(0, {}, 'ranks 0: at least 1 is needed'), (-2, {}, 'ranks -2: at least 1'), (2, dict(batch_size=7), 'batch_size 7 has no equal shares for 2 ranks; take 6 or 8'),
    (16, {}, 'batch_size 8 has no equal shares for 16 ranks; take 16'), (2, dict(device='cuda:0'), "device 'cuda:0': 2 ranks cannot share it"), (2, dict(device='cuda'), "device 'cuda': no GPU for rank 1 of this machine, which has 1; 1 rank will do"),
    (4, dict(device='auto'), "device 'auto': no GPU for rank 3 of this machine, which has 1")])
def test_what_cannot_be_is_refused_before_a_process_starts(tmp_path, monkeypatch, ranks, values, said):
    monkeypatch.setattr(launch, 'RankProcesses', None)
    monkeypatch.setattr(launch, 'train_kd', None)
    monkeypatch.setattr(launch.DistContext.device.__globals__['torch'].cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(launch.DistContext.device.__globals__['torch'].cuda, 'is_available', lambda: True)
    with pytest.raises(KdocrError, match=said) as e: train_ranks(small(tmp_path, **values), ranks)
    assert '\n' not in str(e.value) and not (tmp_path/'run').exists()


def test_what_a_machine_without_a_gpu_can_share(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.DistContext.device.__globals__['torch'].cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(launch.DistContext.device.__globals__['torch'].cuda, 'is_available', lambda: False)
    for n in (1, 2, 4, 8): check_ranks(small(tmp_path), n)
    with pytest.raises(KdocrError, match='which has 0; device cpu will do'): check_ranks(small(tmp_path, device='cuda'), 2)


LOST = _RankExit(0, 1, 1, 'RuntimeError: Connection closed by peer')

@pytest.mark.parametrize('ends, kind, said', [
    ([_RankExit(1, -9), LOST], RankKilled, 'x: rank 1 of 2 was ended by SIGKILL'), ([_RankExit(0, -11), _RankExit(1, 1, 1, 'RuntimeError: lost')], RankKilled, 'rank 0 of 2 was ended by SIGSEGV'),
    ([_RankExit(1, 1, 2, 'its memory is full'), _RankExit(0, -6)], KdocrError, '^its memory is full$'), ([_RankExit(1, 1, 2, 'rank 0: taken'), _RankExit(0, 1, 75, 'taken')], TemporaryFailure, '^taken$'),
    ([_RankExit(1, 1, 2, 'rank 0: no such folder'), _RankExit(0, 1, 2, 'no such folder')], KdocrError, '^no such folder$'), ([LOST, _RankExit(1, 1, 1, 'no')], RuntimeError, 'rank 0: RuntimeError: Connection'),
    ([_RankExit(0, 1, 143, 'stopped by SIGTERM; saved; the same'), _RankExit(1, 1, 143, 'stopped by SIGTERM; saved; the same')], Stopped, '^stopped by SIGTERM; saved; the same$')])
def test_what_the_ends_of_ranks_mean(ends, kind, said):
    fault = explain_exit(ends, 'x')
    assert type(fault) is kind
    with pytest.raises(kind, match=said): raise fault

def test_when_all_ended_well_there_is_no_fault(): assert explain_exit([_RankExit(1, 0, 0), _RankExit(0, 0, 0)], 'x') is None


def test_a_rank_killed_is_no_fault_of_the_program(tmp_path, capsys):
    "Nor is a training that somebody else has stopped; a runner knows both by name."
    cells = [nbformat.v4.new_code_cell(c) for c in (f"out = ''", "class RankKilled(Exception): pass\nraise RankKilled('rank 1 of 2 was ended by SIGKILL')")]
    cells[0].metadata.tags = ['parameters']
    nbformat.write(nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')), cells=cells), tmp_path/'n.ipynb')
    assert main(['run', str(tmp_path/'n.ipynb'), '-p', 'out', str(tmp_path/'out')]) == 75
    assert [read_status(tmp_path/'out')[k] for k in ('state', 'cell', 'error')] == ['rank_killed', 2, 'RankKilled: rank 1 of 2 was ended by SIGKILL'] and 'rank 1 of 2' in capsys.readouterr().err
    assert RankKilled.__name__ == 'RankKilled' and _outcome(notebooks.PapermillExecutionError(2, 1, '', Stopped.__name__, 'stopped by SIGTERM; saved', []))[0] == 'stopped'


def test_a_job_of_several_ranks_has_a_gpu_and_a_core_for_each():
    assert slots(None, [0, 1, 2, 3], list('abcde'), 2) == [_Slot((0, 2), 'a,b'), _Slot((1, 3), 'c,d')]
    assert slots(None, [0, 1, 2, 3, 4], [], 2) == [_Slot((0, 2, 4), None), _Slot((1, 3), None)] and slots(None, [0], [], 2) == [_Slot((0,), None)]
    assert slots(None, [0, 1], ['a'], 2) == [_Slot((0, 1), None)], 'too few GPUs: the run says so'

@pytest.mark.parametrize('own, said', [(dict(ranks=2, batch_size=7), 'r: batch_size 7 has no equal shares for 2 ranks'), (dict(ranks=0), 'r: ranks 0: at least 1'), (dict(ranks='two'), 'r: parameter ranks: .*integer'),
                                       (dict(rank=2), "unknown key 'rank'")])
def test_a_sweep_refuses_ranks_that_cannot_be(tmp_path, own, said):
    with pytest.raises(KdocrError, match=said): make_sweep(dict(out=str(tmp_path), list=[dict(own, name='r')]))

def test_a_sweep_hands_ranks_to_the_notebook_and_not_to_the_config(tmp_path):
    plan = make_sweep(dict(out=str(tmp_path), base=dict(batch_size=8, steps=3, data='/plates'), grid=dict(ranks=[1, 2])))
    assert {j.name: j.params['ranks'] for j in plan.jobs} == {'ranks=1': 1, 'ranks=2': 2} and _config_of(plan.jobs[0]).steps == 3

def test_a_kernel_that_is_buried_takes_what_it_started_with_it():
    code = "import subprocess, sys, time\np = subprocess.Popen(['sleep', '600'], start_new_session=True)\nprint(p.pid, flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as p:
        kernel, child = psutil.Process(p.pid), psutil.Process(int(p.stdout.readline()))
        kernel.suspend()
        notebooks._kill_kernel(dict(kernel=p.pid, kernel_born=kernel.create_time() + 60))
        assert kernel.is_running() and child.is_running(), 'another process, by the same number'
        notebooks._kill_kernel(dict(kernel=p.pid, kernel_born=kernel.create_time()))
        assert not kernel.is_running() and not until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE) is None


# ---------------------------------------------------------------- trainings that are disturbed

def ranks_of(pid=None):
    "The ranks among the descendants of a process, by number."
    def number(p):
        try: return p.environ()['RANK'] if 'kdocr.training.launch' in p.cmdline() and p.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, KeyError): return None
    try: return {int(n): p for p in psutil.Process(pid).children(recursive=True) if (n := number(p)) is not None}
    except psutil.NoSuchProcess: return {}

def until(true, what='it takes too long', seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if got := true(): return got
        time.sleep(.02)
    pytest.fail(what)

def step(run): return len({r['step'] for r in run.log.rows()})

def killed_at(run, rank, at, delay, pid=None):
    "A thread that kills a rank a moment after step `at` is logged; 0: after it has started."
    def kill():
        until(lambda: len(ranks_of(pid)) == 2 and step(run) >= at)
        time.sleep(delay)
        ranks_of(pid)[rank].kill()
    t = threading.Thread(target=kill, daemon=True)
    t.start()
    return t


def command(*args): return subprocess.Popen([sys.executable, '-m', 'kdocr', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@pytest.mark.slow
def test_whatever_ends_ranks_costs_nothing_but_time(tmp_path):
    "One run: a rank is killed while it starts, another at a random moment; then, under a runner, a rank, the kernel, and a SIGTERM. Each time the same again, in a folder of an awkward name."
    out, rng = tmp_path/'Läufe mit Lücken', random.Random(time.time_ns())
    cfg, run = small(out, name='e é', **TRAIN), RunFolder(out/'e é')
    whole = train_ranks(small(tmp_path, name='whole', **TRAIN), 2)

    moments = [(rng.randrange(2), at, rng.uniform(0, .15)) for at in (0, rng.randrange(1, 10))]
    for rank, at, delay in moments:
        killer = killed_at(run, rank, at, delay)
        with pytest.raises(RankKilled, match=f'rank {rank} of 2 was ended by SIGKILL.*the same command goes on'): train_ranks(cfg, 2)
        killer.join()
        assert not ranks_of() and not run.finished, moments

    words = [w for k, v in dict(SMALL, **TRAIN, data=drawn(), out=out, name='e é', ranks=2).items() for w in ('-p', k, v)]
    ends, steps = [], []
    for victim, at in (('rank', rng.randrange(10, 14)), ('kernel', rng.randrange(14, 18)), ('runner', 26)): # far enough for no log of the killed start to reach it
        caller = command('run', 'train_kd', *words)
        until(lambda: caller.poll() is not None or step(run) >= at and len(ranks_of(caller.pid)) == 2)
        ranks = ranks_of(caller.pid)
        {'rank': lambda: ranks[rng.randrange(2)].kill(), 'kernel': lambda: os.kill(read_status(run.path)['kernel'], signal.SIGKILL), 'runner': caller.terminate}[victim]()
        said = caller.communicate(timeout=60)[1]
        ends.append((caller.returncode, read_status(run.path)['state']))
        assert not run.finished and not psutil.wait_procs(ranks.values(), 5)[1], said
        assert said.splitlines()[-1].startswith('kdocr: ') and dict(rank='of 2 was ended by SIGKILL', kernel='its kernel died', runner='stopped by SIGTERM')[victim] in said
        steps.append(load_checkpoint(run.last)['step'])
    assert ends == [(75, 'rank_killed'), (75, 'dead_kernel'), (143, 'stopped')]
    assert steps[0] % 4 == steps[1] % 4 == 0 and steps[2] >= 26, 'a kill leaves what was saved, a stop saves where it is'

    caller = command('run', 'train_kd', *words)
    said = caller.communicate(timeout=120)
    assert caller.returncode == 0, said[1]
    assert same_end(run, whole) and read_status(run.path)['attempt'] == 4 and (run.path/'figures'/'losses.png').exists(), moments
    assert [r['step'] for r in run.log.rows() if 'loss' in r] == list(range(1, 41)), 'each step once'
    assert {p.name for p in run.last.parent.iterdir()} == {'last.pth', 'best.pth'}, 'no half-written file stays'
    shown = [o.text for c in nbformat.read(run.path/'train_kd.ipynb', 4).cells if c.cell_type == 'code' for o in c.outputs if o.output_type == 'stream' and o.name == 'stderr']
    assert len(shown) == 1 and shown[0].count('40/40') == 1 and '40/40' in (run.path/'train_kd.log').read_text(), 'one bar'
    assert 'ranks' not in yaml.safe_load(run.config.read_text()) and read_json(run.env)['usage']['ranks'] == 2

    before = run.scores.read_bytes(), run.log.path.read_bytes()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(launch, 'RankProcesses', None)
        train_ranks(cfg, 2) # finished: nobody is started
    assert before == (run.scores.read_bytes(), run.log.path.read_bytes())


@pytest.mark.slow
def test_a_rank_of_a_sweep_that_is_killed_ends_as_if_nothing_had_been(tmp_path, capsys):
    "Two runs alike; a rank of one of them is killed at a random moment. The sweep tries that one again, and both end in the same bits."
    rng, plan = random.Random(time.time_ns()), tmp_path/'s.yaml'
    plan.write_text(yaml.safe_dump(dict(out=str(tmp_path/'out'), base=dict(SMALL, **TRAIN, data=drawn(), ranks=2), list=[dict(name='a'), dict(name='b')])))
    hit, rank, at, delay = moment = rng.choice('ab'), rng.randrange(2), rng.randrange(28), rng.uniform(0, .1)
    runs = {n: RunFolder(tmp_path/'out'/n) for n in 'ab'}
    caller = command('sweep', plan, '--cores', 1)
    until(lambda: caller.poll() is not None or runs[hit].path.exists() and read_status(runs[hit].path)['state'] == 'running')
    killed_at(runs[hit], rank, at, delay, caller.pid)
    out, err = caller.communicate(timeout=240)
    assert caller.returncode == 0, err
    assert out.count('running, try 2') == 1 and f'{hit}: running, try 2' in out and f'rank {rank} of 2 was ended by SIGKILL' in out, (moment, out)
    assert main(['sweep', str(plan)]) == 0 and '2 of 2 finished' in capsys.readouterr().out
    assert same_end(runs['a'], runs['b']), moment
    for n, run in runs.items():
        assert read_status(run.path)['attempt'] == 1 + (n == hit) and out.count(f'{n}: finished') == 1, moment
        assert [r['step'] for r in run.log.rows() if 'loss' in r] == list(range(1, 41)) and not list(run.path.rglob('.*.tmp'))
