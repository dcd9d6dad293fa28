"""The index of runs: states from the files that a run leaves, whatever is damaged; choosing, sorting, and what the command prints."""
import json, subprocess, sys
import pytest
from kdocr.cli import main
from kdocr.config import make_config, save_config
from kdocr.core import KdocrError, is_locked
from kdocr.jobs.runs import _format_age, runs_text, read_runs, _run_folders, select, _total_steps
from kdocr.training.run_folder import RunFolder
from kdocr.jobs.status import Status, _utc, log_end


def make(results, name, steps=10, of=10, scores=None, status=None, **values):
    "A run folder as a training leaves it."
    folder = results/name
    save_config(make_config(dict(dict(steps=of, name=folder.name, out=str(results)), **values)), folder/'config.yaml')
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(dict(step=s, epoch=s / 5, loss=1 / s)) + '\n' for s in range(1, steps + 1)))
    if scores: (folder/'scores.json').write_text(json.dumps(scores))
    if status: (folder/'status.json').write_text(json.dumps({**dict(pid=1, host='elsewhere', heartbeat=_utc(), attempt=1), **status}))
    return folder

def scored(exact_match, n=300): return dict(val=dict(n=50, exact_match=.9), test=dict(n=n, exact_match=exact_match), steps=10, step=8)

@pytest.fixture
def results(tmp_path):
    r = tmp_path/'Ergebnisse, März'
    make(r, 'hr', scores=scored(.5))
    make(r, 'exp/soft-0', 4, mode='student', arm='soft', control='ctc', teacher_checkpoint='hr_best.pth', status=dict(state='running'))
    make(r, 'exp/soft-1', 4, mode='student', arm='soft', control='ctc', teacher_checkpoint='hr_best.pth', seed=1, lr=.01, status=dict(state='running', heartbeat=_utc(100)))
    make(r, 'ctc', 7, mode='student', arm='ctc', distill_weight=0., status=dict(state='failed', error='ValueError: no'))
    make(r, 'begun', 0)
    (r/'embedded/train/Scenario-A').mkdir(parents=True)
    (r/'hr_best.pth').touch()
    return r

def states(rows): return {r['name']: r['state'] for r in rows}


def test_rows(results):
    rows = {r['name']: r for r in read_runs(results)}
    assert states(rows.values()) == {'begun': 'new', 'ctc': 'failed', 'exp/soft-0': 'running', 'exp/soft-1': 'dead', 'hr': 'finished'}
    hr, soft = rows['hr'], rows['exp/soft-1']
    assert [hr[k] for k in ('step', 'steps', 'mode', 'arm', 'seed', 'val', 'test', 'n')] == [10, 10, 'teacher', None, 0, .9, .5, 300] and 0 <= hr['age'] < 100
    assert [soft[k] for k in ('step', 'steps', 'mode', 'arm', 'seed', 'val', 'test')] == [4, 10, 'student', 'soft', 1, None, None] and soft['config']['lr'] == .01
    assert rows['ctc']['error'] == 'ValueError: no'
    assert [r['name'] for r in read_runs(results/'hr')] == ['hr'] and [r['name'] for r in read_runs(results/'exp')] == ['soft-0', 'soft-1']

def test_of_two_testimonies_the_newer_counts(results):
    make(results, 'a', status=dict(state='stopped'))
    (results/'a/scores.json').write_text(json.dumps(scored(.1)))              # finished afterwards, by train_kd
    make(results, 'b', scores=scored(.1))
    (results/'b/status.json').write_text(json.dumps(dict(state='failed', pid=1, host='x', heartbeat=_utc(), attempt=1, error='no figure'))) # the notebook failed after its training
    assert [states(read_runs(results))[k] for k in 'ab'] == ['finished', 'failed']

def test_a_training_without_a_notebook_is_seen_at_work(results):
    run = RunFolder(make(results, 'r', 3))
    assert states(read_runs(results))['r'] == 'stopped'
    code = f"from kdocr.core import try_lock\nfrom pathlib import Path\nwith try_lock(Path({str(run.path/'.lock')!r}), 'training'): print('in', flush=True); input()"
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'in\n'
        assert states(read_runs(results))['r'] == 'running' and is_locked(run.path/'.lock')
        other.kill()
    assert not is_locked(run.path/'.lock')
    with run.alone(): pass # looking took nothing

def test_a_notebook_that_never_came_to_a_config(tmp_path):
    (tmp_path/'r/x').mkdir(parents=True)
    Status(tmp_path/'r/x').end('failed', error='KdocrError: no such folder')
    assert [(r['name'], r['state'], r['step'], r['mode'], r['error']) for r in read_runs(tmp_path/'r')] == [('x', 'failed', 0, None, 'KdocrError: no such folder')]

@pytest.mark.parametrize('file, text', [('config.yaml', 'mode: ['), ('config.yaml', ''), ('config.yaml', '- a'), ('config.yaml', b'\xff\xfe'), ('scores.json', '{'), ('scores.json', ''), ('scores.json', '[1]'),
                                        ('scores.json', '{"test": [1]}'), ('status.json', '{}'), ('status.json', 'null'), ('status.json', '{"state": "running", "pid": "x", "host": "y", "heartbeat": "soon"}'), ('metrics.jsonl', 'no\n'), ('metrics.jsonl', '[1]\n')])
def test_a_damaged_folder_is_a_row_and_stops_nobody(results, file, text, capsys):
    (results/'hr'/file).write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = {r['name']: r for r in read_runs(results)}
    assert rows['hr']['state'] == 'damaged' and rows['hr']['error'] and len(rows) == 5 and rows['exp/soft-0']['state'] == 'running'
    assert main(['ls', str(results), '--filter', 'lr=0.003']) == 0 and main(['ls', str(results), '--json']) == 0
    assert 'soft-0' in capsys.readouterr().out

def test_a_log_being_written(tmp_path):
    log = tmp_path/'metrics.jsonl'
    assert log_end(log) == ({}, {})
    for text, last, val in (('', {}, {}), ('{"step": 1', {}, {}), ('{"step": 1}\n{"st', {'step': 1}, {}), ('{"step": 1, "val_exact_match": 0.5}\n{"step": 2}\n{', {'step': 2}, {'step': 1, 'val_exact_match': .5})):
        log.write_text(text)
        assert log_end(log) == (last, val)
    log.write_text(''.join(json.dumps(dict(step=i, pad='x' * 100, **({'val_exact_match': i} if i % 500 == 0 else {}))) + '\n' for i in range(1, 5001)) + '{"step": 50')
    assert log_end(log)[0]['step'] == 5000 and log_end(log)[1]['val_exact_match'] == 5000

def test_steps_from_epochs():
    assert [_total_steps(c, l) for c, l in (({'steps': 5, 'epochs': 9}, {}), ({'steps': None, 'epochs': 3}, {'step': 7, 'epoch': 7 / 2.5}), ({'steps': None, 'epochs': 3}, {}), ({}, {}))] == [5, 8, None, None]


@pytest.mark.parametrize('filters, names', [
    (['state=finished'], ['hr']), (['arm=soft'], ['exp/soft-0', 'exp/soft-1']), (['arm=s?ft', 'seed=1'], ['exp/soft-1']), (['name=exp/*'], ['exp/soft-0', 'exp/soft-1']), (['lr=1e-2'], ['exp/soft-1']),
    (['test=0.5'], ['hr']), (['distill_taps=logits', 'distill_weight=0'], ['ctc']), (['clean_hr_guided=true', 'mode=teacher'], ['begun', 'hr']), (['data=none', 'seed=1'], ['exp/soft-1']), (['arm='], ['begun', 'hr']), (['seed=x'], [])])
def test_filters(results, filters, names): assert [r['name'] for r in select(read_runs(results), filters)] == names

@pytest.mark.parametrize('sort, reverse, names', [('name', False, ['begun', 'ctc', 'exp/soft-0', 'exp/soft-1', 'hr']), ('step', True, ['hr', 'ctc', 'exp/soft-1', 'exp/soft-0', 'begun']),
                                                  ('lr', True, ['exp/soft-1', 'hr', 'exp/soft-0', 'ctc', 'begun']), ('test', False, ['hr', 'begun', 'ctc', 'exp/soft-0', 'exp/soft-1'])])
def test_sorting(results, sort, reverse, names): assert [r['name'] for r in select(read_runs(results), sort=sort, reverse=reverse)] == names

def test_the_table(results, capsys):
    assert main(['ls', str(results), '--sort', 'test']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['run', 'state', 'step', 'mode', 'arm', 'seed', 'val', '%', 'test', '%', 'n', 'age', 'error']
    assert lines[1].split()[:9] == ['hr', 'finished', '10', 'of', '10', 'teacher', '0', '90.0', '50.0'] and lines[-1] == '5 runs: 1 dead, 1 failed, 1 finished, 1 new, 1 running'
    assert [_format_age(s) for s in (None, 59, 60, 3600, 86400 * 9)] == ['', '59 s', '1 min', '1 h', '9 d'] and runs_text([]) == 'no runs'

def test_json_says_all(results, capsys):
    assert main(['ls', str(results), '--json', '--filter', 'name=hr']) == 0
    said, = json.loads(capsys.readouterr().out)
    assert said['config']['lr'] == .003 and said['test'] == .5 and said['folder'] == str(results/'hr')

@pytest.mark.parametrize('args, said', [(['--sort', 'tset'], "no column or setting 'tset': did you mean 'test'?"), (['--filter', 'lrr=1'], "no column or setting 'lrr': did you mean 'lr'?"), (['--filter', 'lr'], 'KEY=VALUE is needed')])
def test_unknown_keys_are_named(results, capsys, args, said):
    assert main(['ls', str(results), *args]) == 2 and said in capsys.readouterr().err

def test_no_such_folder(tmp_path, capsys):
    assert main(['ls', str(tmp_path/'none')]) == 2 and 'none: no such folder' in capsys.readouterr().err
    assert _run_folders(tmp_path) == [] and main(['ls', str(tmp_path)]) == 0

def test_nothing_heavy_is_imported(results):
    code = f"import sys\nfrom kdocr.cli import main\nmain(['ls', {str(results)!r}])\nsys.exit(any(m in sys.modules for m in ('torch', 'pandas', 'papermill', 'matplotlib')))"
    assert subprocess.run([sys.executable, '-c', code], stdout=subprocess.DEVNULL).returncode == 0
