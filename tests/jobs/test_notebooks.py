"""papermill runs: parameters checked before, the executed notebook kept, a kernel that can be interrupted, a status that is true; and the shipped notebooks."""
import errno, json, os, signal, subprocess, sys, time
from pathlib import Path
import nbformat
import psutil
import pytest
from kdocr.jobs import notebooks, status as status_module
from kdocr.cli import main
from kdocr.core import KdocrError, TemporaryFailure, read_json
from kdocr.config import Config
from kdocr.jobs.notebooks import (NotebookRun, _exclusive, check_parameters, _interrupt, notebook_path, parameters,
                                  read_status, run_notebook, _shipped_notebooks)
from kdocr.training.run_folder import RunFolder
from kdocr.jobs.status import Status, _utc, current_state


def write(path, *cells):
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')), cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.cells[0].metadata.tags = ['parameters']
    nbformat.write(nb, path)
    return path

def outputs(path): return [o.get('text', o.get('ename', '')) for c in nbformat.read(path, 4).cells if c.cell_type == 'code' for o in c.outputs]

@pytest.fixture
def notebook(tmp_path):
    return write(tmp_path/'n.ipynb', "lr = 0.5\nsteps: 'int' = None\nteacher_checkpoint: 'Path' = None\nstudent_init = 'random'\nruns: 'list[Path]' = []\ncount = 3\nflag = False",
                 'print([lr, steps, teacher_checkpoint, student_init, runs, count, flag])')


@pytest.mark.parametrize('given, name, value', [
    ('1e-3', 'lr', 1e-3), ('7', 'steps', 7), ('none', 'steps', None), ('4', 'count', 4), ('true', 'flag', True), ('teacher', 'student_init', 'teacher'),
    ('t.pth', 'teacher_checkpoint', str(Path('t.pth').absolute())), ('s.pth', 'student_init', str(Path('s.pth').absolute())),
    ('a, b', 'runs', [str(Path('a').absolute()), str(Path('b').absolute())]), (['a'], 'runs', [str(Path('a').absolute())])])
def test_values_are_cast(notebook, given, name, value):
    assert check_parameters(notebook, {name: given}) == {name: value}

@pytest.mark.parametrize('name, given, said', [('step', 1, "no parameter 'step': did you mean 'steps'"), ('lr', 'fast', 'parameter lr: .*valid number'),
                                               ('steps', '-3', 'parameter steps: .*greater than 0'), ('count', '1.5', 'parameter count'), ('flag', 'perhaps', 'parameter flag')])
def test_bad_parameters_are_named(notebook, name, given, said):
    with pytest.raises(KdocrError, match=said): check_parameters(notebook, {name: given})

def test_what_is_no_notebook_is_said(tmp_path):
    for name, text in (('a.ipynb', 'no JSON'), ('b.ipynb', '{}'), ('c.ipynb', '[1]'), ('d.ipynb', '')):
        (tmp_path/name).write_text(text)
        with pytest.raises(KdocrError, match=f'{name}: no Jupyter notebook$'): check_parameters(tmp_path/name, {})

def test_values_arrive_and_the_notebook_is_kept(notebook, tmp_path):
    kept = run_notebook(notebook, tmp_path/'out {x}', {'lr': '1e-3', 'runs': 'a'})
    assert kept == tmp_path/'out {x}/n.ipynb' and outputs(kept) == [f"[0.001, None, None, 'random', ['{Path('a').absolute()}'], 3, False]\n"]

def test_a_failing_notebook_is_kept_and_said(tmp_path):
    with pytest.raises(KdocrError, match=r'bad.ipynb, cell 1: ZeroDivisionError: division by zero \(kept: ') as e: run_notebook(write(tmp_path/'bad.ipynb', 'x = 0', '1 / x'), tmp_path/'out')
    assert e.value.exit_code == 2 and 'ZeroDivisionError' in outputs(tmp_path/'out/bad.ipynb')
    said = read_status(tmp_path/'out')
    assert (said['state'], said['cell'], said['error'], said['attempt']) == ('failed', 1, 'ZeroDivisionError: division by zero', 1) and said['ended']
    assert 'ZeroDivisionError: division by zero' in (tmp_path/'out/bad.log').read_text()

def test_a_kernel_that_is_killed_is_no_fault_of_the_program(tmp_path):
    nb = write(tmp_path/'dies.ipynb', 'x = 0', "print('so far')", 'import os, signal\nif x == 0: os.kill(os.getpid(), signal.SIGKILL)')
    with pytest.raises(TemporaryFailure, match='its kernel died') as e: run_notebook(nb, tmp_path/'out')
    assert e.value.exit_code == 75 and outputs(tmp_path/'out/dies.ipynb') == ['so far\n']
    assert [read_status(tmp_path/'out')[k] for k in ('state', 'cell')] == ['dead_kernel', 2]
    run_notebook(nb, tmp_path/'out', dict(x=1))
    assert [read_status(tmp_path/'out')[k] for k in ('state', 'error', 'attempt', 'params')] == ['finished', None, 2, dict(x=1)]

def test_a_time_limit_lets_the_cell_tidy_up(tmp_path, capfd):
    nb = write(tmp_path/'slow.ipynb', "out = ''", "print('so far')", f'import time, pathlib\ntry: time.sleep(600)\nfinally: pathlib.Path({str(tmp_path/"saved")!r}).touch()')
    assert main(['run', str(nb), '--timeout', '4', '-p', 'out', str(tmp_path/'out')]) == 124
    assert 'slow.ipynb, cell 3: not done after 4 seconds (KeyboardInterrupt)' in capfd.readouterr().err
    assert (tmp_path/'saved').exists() and 'so far\n' in outputs(tmp_path/'out/slow.ipynb') and read_status(tmp_path/'out')['state'] == 'timeout'

@pytest.mark.parametrize('given', ['0', '-1', 'nan', 'inf', 'soon'])
def test_a_time_limit_is_a_time(given, capfd):
    assert main(['run', 'train_kd', '--timeout', given]) == 2 and '--timeout' in capfd.readouterr().err

def test_twenty_thousand_lines_go_to_the_log(tmp_path):
    kept = run_notebook(write(tmp_path/'chatty.ipynb', 'n = 20_000', 'import sys\nfor i in range(n): print("line", i)\nfor i in range(500): print(f"\\rbar {i}", end="", file=sys.stderr, flush=True)\nprint("end")'), tmp_path/'out')
    shown = {o.name: o.text.split('\n') for o in nbformat.read(kept, 4).cells[1].outputs}
    assert len(shown['stdout']) == 202 and shown['stdout'][:2] == ['line 0', 'line 1'] and shown['stdout'][-2] == 'end' and '19,801 lines are left out here: see chatty.log' in shown['stdout'][100]
    assert shown['stderr'] == ['bar 499'] and kept.stat().st_size < 20_000
    log = (tmp_path/'out/chatty.log').read_text().splitlines()
    assert [l for l in log if l.startswith('line')] == [f'line {i}' for i in range(20_000)] and sum('bar' in l for l in log) < 10


def full(*_, **kw): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def test_a_cell_that_finds_the_disk_full(tmp_path):
    nb = write(tmp_path/'n.ipynb', 'room = False', f'import errno, os\nif not room: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))')
    with pytest.raises(TemporaryFailure, match='cell 1: OSError: .*No space left on device') as e: run_notebook(nb, tmp_path/'out')
    assert e.value.exit_code == 75 and read_status(tmp_path/'out')['state'] == 'no_space'
    run_notebook(nb, tmp_path/'out', dict(room=True))
    assert [read_status(tmp_path/'out')[k] for k in ('state', 'attempt')] == ['finished', 2]

def test_a_runner_that_finds_the_disk_full(notebook, tmp_path, monkeypatch):
    "Neither the notebook nor a new status can be written; the old status is, in place, and tells the truth. Then there is room."
    run_notebook(notebook, tmp_path/'out')
    before = (tmp_path/'out/n.ipynb').read_bytes()
    with monkeypatch.context() as m:
        for module in (notebooks, status_module): m.setattr(module, 'atomic_write', full)
        with pytest.raises(TemporaryFailure, match='n.ipynb.*could not be kept .No space left on device'): run_notebook(notebook, tmp_path/'out')
    assert [read_status(tmp_path/'out')[k] for k in ('state', 'attempt')] == ['no_space', 2] and (tmp_path/'out/n.ipynb').read_bytes() == before
    run_notebook(notebook, tmp_path/'out')
    assert [read_status(tmp_path/'out')[k] for k in ('state', 'attempt')] == ['finished', 3]

def test_a_disk_that_is_full_from_the_start(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(status_module, 'atomic_write', full)
    with pytest.raises(TemporaryFailure, match='out: cannot be written to .No space left'): run_notebook(notebook, tmp_path/'out')

def test_what_a_status_says_by_now(tmp_path):
    with subprocess.Popen([sys.executable, '-c', '']) as ended: pass
    here = dict(state='running', pid=os.getpid(), host=status_module.socket.gethostname(), heartbeat=_utc(), attempt=1)
    said = lambda **kw: current_state({**here, **kw})
    assert [said(), said(pid=ended.pid), said(heartbeat=_utc(61)), said(host='x', pid=ended.pid), said(host='x', heartbeat=_utc(61)), said(state='failed', pid=ended.pid)] == ['running', 'dead', 'dead', 'running', 'dead', 'failed']
    assert read_status(tmp_path) == {'state': 'new'}
    for text in ('', '{', '[]', '{"state": "running"}', json.dumps(dict(here, heartbeat='soon'))):
        (tmp_path/'status.json').write_text(text)
        with pytest.raises(KdocrError, match='status.json'): read_status(tmp_path)
    assert Status(tmp_path).values['attempt'] == 1 and read_status(tmp_path)['state'] == 'running', 'a damaged one is mended'

def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(status_module, 'BEAT', .05)
    status = Status(tmp_path)
    (tmp_path/'status.json').unlink()
    while not (tmp_path/'status.json').exists(): time.sleep(.01)
    status.end('finished')
    assert read_status(tmp_path)['state'] == 'finished' and (tmp_path/'status.json').stat().st_size == 4096

def test_one_runner_a_folder(notebook, tmp_path, capfd):
    (tmp_path/'out').mkdir()
    with _exclusive(tmp_path/'out', 'first.ipynb'):
        with pytest.raises(TemporaryFailure, match=rf'out: another process is at work on this run \(first.ipynb, pid {os.getpid()} on '): run_notebook(notebook, tmp_path/'out')
        assert main(['run', str(write(tmp_path/'o.ipynb', "out = ''")), '-p', 'out', str(tmp_path/'out')]) == 75
        assert capfd.readouterr().err.count('\n') == 1
    with RunFolder(tmp_path/'out').alone(), pytest.raises(TemporaryFailure, match='another process is at work on this run .training, pid'): run_notebook(notebook, tmp_path/'out')
    assert not (tmp_path/'out/n.ipynb').exists() and not (tmp_path/'out/status.json').exists(), 'the second touches nothing'
    run_notebook(notebook, tmp_path/'out')

def test_a_runner_on_another_machine(tmp_path, monkeypatch):
    "Its lock is not seen here. While its heart beats it is left alone; silent for long, it is dead."
    there = dict(state='running', pid=1, host='elsewhere', heartbeat=_utc(30), attempt=1, notebook='/x/n.ipynb')
    says = lambda **kw: (tmp_path/'status.json').write_text(json.dumps({**there, **kw}))
    says()
    monkeypatch.setattr(notebooks.time, 'sleep', lambda s: says(heartbeat=_utc()))
    with pytest.raises(TemporaryFailure, match='n.ipynb, pid 1 on elsewhere'), _exclusive(tmp_path, 'me'): pass
    says()
    monkeypatch.setattr(notebooks.time, 'sleep', lambda s: says(heartbeat=_utc(61)))
    with _exclusive(tmp_path, 'me'): pass

def test_four_at_once(notebook, tmp_path):
    runs = [NotebookRun(notebook, tmp_path/f'{i}.ipynb', dict(count=i)) for i in range(4)]
    assert [outputs(r.result())[0].split(', ')[-2] for r in runs] == list('0123')

def test_interrupting_lets_the_cell_tidy_up(tmp_path):
    nb = write(tmp_path/'slow.ipynb', 'x = 0', f'''import time, pathlib
try:
    pathlib.Path({str(tmp_path/"begun")!r}).touch()
    time.sleep(600)
except KeyboardInterrupt: pathlib.Path({str(tmp_path/"saved")!r}).touch(); raise''')
    run = NotebookRun(nb, tmp_path/'kept.ipynb', {})
    while not (tmp_path/'begun').exists(): time.sleep(.05)
    _interrupt([run])
    assert run.done() and (tmp_path/'saved').exists() and 'KeyboardInterrupt' in outputs(tmp_path/'kept.ipynb')

def start(*args, **kw): return subprocess.Popen([sys.executable, '-m', 'kdocr', 'run', *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kw)

def until(true, what):
    for _ in range(600):
        if true(): return
        time.sleep(.1)
    pytest.fail(what)

@pytest.mark.parametrize('stuck', [False, True])
def test_a_runner_that_is_killed_leaves_no_kernel_and_no_lie(tmp_path, stuck):
    "The kernel ends by itself; one that cannot, because it hangs, the next start ends."
    nb = write(tmp_path/'slow.ipynb', "out = ''\nseconds = 600", f'import os, pathlib, time\nprint("so far", flush=True)\ntime.sleep(.5)\npathlib.Path({str(tmp_path/"pid")!r}).write_text(str(os.getpid()))\ntime.sleep(seconds)')
    out = tmp_path/'Läufe, mit Lücken'
    caller = start(nb, '-p', 'out', out)
    until(lambda: (tmp_path/'pid').exists() and (tmp_path/'pid').read_text() and 'so far' in (out/'slow.ipynb').read_text(), 'no kernel, or the notebook is not renewed while its cell runs')
    kernel = int((tmp_path/'pid').read_text())
    assert read_status(out)['state'] == 'running' and read_status(out)['pid'] == caller.pid and read_status(out)['kernel'] == kernel
    if stuck: os.kill(kernel, signal.SIGSTOP)
    caller.kill()
    caller.communicate()
    assert read_status(out)['state'] == 'dead'
    if not stuck: until(lambda: not alive(kernel), 'the kernel lives on')
    run_notebook(nb, out, dict(seconds=0))
    assert not alive(kernel) and [read_status(out)[k] for k in ('state', 'attempt')] == ['finished', 2]
    nbformat.read(out/'slow.ipynb', 4)

@pytest.mark.parametrize('sig, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_notebook_so_far(tmp_path, sig, code):
    nb = write(tmp_path/'slow.ipynb', "out = ''", "print('so far')", f'import pathlib, time\npathlib.Path({str(tmp_path/"begun")!r}).touch()\ntime.sleep(600)', "print('never')")
    caller = start(nb, '-p', 'out', tmp_path/'out')
    until((tmp_path/'begun').exists, 'it does not begin')
    caller.send_signal(sig)
    said = caller.communicate()[1]
    assert caller.returncode == code and f'stopped by {sig.name}' in said and 'the same command goes on' in said and 'Traceback' not in said
    assert 'so far\n' in outputs(tmp_path/'out/slow.ipynb') and 'never\n' not in outputs(tmp_path/'out/slow.ipynb')
    assert [read_status(tmp_path/'out')[k] for k in ('state', 'cell', 'error')] == ['stopped', 3, 'KeyboardInterrupt']

@pytest.mark.slow
def test_a_training_that_is_stopped_and_killed_ends_as_if_nothing_had_been(tmp_path):
    "SIGTERM to its runner, SIGKILL to its kernel; each time the same command again, in a folder of an awkward name."
    from small_runs import SMALL, drawn, same_end, small
    from kdocr.training.train_kd import train_kd
    settings = dict(steps=60, checkpoint_every=5, eval_every=30)
    whole = train_kd(small(tmp_path, name='whole', **settings))
    out = tmp_path/'Läufe mit Lücken'
    run = RunFolder(out/'e é')
    words = [w for k, v in dict(SMALL, out=out, name='e é', data=drawn(), **settings).items() for w in ('-p', k, v)]
    def grown(): return run.last.exists() and run.last.stat().st_mtime_ns > seen
    states, seen = [], 0
    for sig, kernel in ((signal.SIGTERM, False), (signal.SIGKILL, True)):
        caller = start('train_kd', *words)
        until(lambda: grown() or caller.poll() is not None, 'no checkpoint')
        os.kill(read_status(run.path)['kernel'] if kernel else caller.pid, sig)
        said = caller.communicate()[1]
        states.append((caller.returncode, read_status(run.path)['state']))
        assert not run.finished, said
        seen = run.last.stat().st_mtime_ns
    assert states == [(143, 'stopped'), (75, 'dead_kernel')]
    run_notebook('train_kd', run.path, dict(zip(words[1::3], map(str, words[2::3]))))
    assert [read_status(run.path)[k] for k in ('state', 'attempt')] == ['finished', 3] and same_end(run, whole)
    usage = read_json(run.env)['usage']
    assert usage['device'] == 'cpu' and usage['precision'] == 'fp32' and usage['gpu_utilisation'] is None and usage['peak_memory_mb'] > 50
    assert 0 < usage['steps'] < 60 and usage['steps_per_s'] == pytest.approx(usage['steps'] / usage['seconds'], rel=.01)

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split(') ')[1][0] != 'Z'
    except FileNotFoundError: return False


def test_shipped_notebooks_are_found_by_name():
    assert {'train_kd', 'loss_curves', 'feature_alignment', 'benchmark'} <= _shipped_notebooks().keys()
    assert notebook_path('loss_curves') == notebook_path('analysis/loss_curves.ipynb') == notebook_path('nbs/analysis/loss_curves')
    with pytest.raises(KdocrError, match="did you mean 'train_kd'"): notebook_path('trainkd')
    with pytest.raises(KdocrError, match='no such file'): notebook_path('elsewhere/train_kd.ipynb')

@pytest.mark.parametrize('name', sorted(_shipped_notebooks()))
def test_the_parameters_tag_is_there(name): assert parameters(_shipped_notebooks()[name])

def test_what_the_config_can_say_the_run_notebook_can():
    assert parameters(notebook_path('train_kd')).keys() == {*Config.model_fields, 'ranks'}

@pytest.mark.parametrize('name', ['loss_curves', 'feature_alignment'])
def test_analysis_without_runs_says_how_to_make_some(name, tmp_path):
    assert 'kdocr demo' in ' '.join(outputs(run_notebook(name, tmp_path, {'out': tmp_path})))
