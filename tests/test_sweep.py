"""An experiment from one file: what it runs, what it refuses, and the whole of it in its smallest form."""
import json
from pathlib import Path

import pytest
import yaml

from kdocr.cli import main
from kdocr.config import load_config, make_config
from kdocr.core import KdocrError
from kdocr.sweep import load_sweep, sweep
from kdocr.train_kd import train_kd
from training import SMALL, drawn

ROOT = Path(__file__).resolve().parent.parent
PLAN = dict(seeds=[0, 1], base=dict(SMALL), teachers=dict(hr={}),
            arms=dict(control=dict(distill_weight=0), seed=dict(teacher='hr', control='control')))


def write(tmp_path, **values):
    file = tmp_path/'plan.yaml'
    file.write_text(yaml.safe_dump({**PLAN, 'out': str(tmp_path/'out'), **values}))
    return file


def test_the_jobs_are_what_the_file_says(tmp_path):
    plan = load_sweep(write(tmp_path))
    assert [(j.name, j.needs) for j in plan.jobs] == [('hr', None), ('control-0', None), ('seed-0', 'hr'), ('control-1', None), ('seed-1', 'hr')]
    assert plan.students == ['control-0', 'seed-0', 'control-1', 'seed-1']
    last = plan.jobs[-1].params
    assert (last['arm'], last['control'], last['seed'], last['mode'], last['teacher_checkpoint']) == ('seed', 'control', 1, 'student', str(tmp_path/'out/hr_best.pth'))


@pytest.mark.parametrize('values,says', [
    (dict(arms=dict(seed=dict(teacher='hr'))), 'seed: learns from a teacher and names no control'),
    (dict(arms=dict(PLAN['arms'], seed=dict(teacher='hr', control='contrl'))), "no arm 'contrl' to be its control: did you mean 'control'?"),
    (dict(arms=dict(PLAN['arms'], control=dict(teacher='hr', control='seed'))), 'learns from a teacher itself'),
    (dict(arms=dict(PLAN['arms'], seed=dict(teacher='rh', control='control'))), "no teacher 'rh'"),
    (dict(arms=dict(PLAN['arms'], seed=dict(teacher='hr', control='control', distill_terms='logits:kll'))), "no term 'kll': did you mean 'kl'?"),
    (dict(arms=dict(PLAN['arms'], seed=dict(teacher='hr', control='control', lrr=1))), "unknown key 'lrr'"),
    (dict(arms={}), 'no arms'), (dict(seeds=[1, 1]), 'a list of different numbers'), (dict(seeds=3), 'a list of different numbers'),
    (dict(base={k: v for k, v in SMALL.items() if k != 'steps'}), 'steps: an experiment compares equal numbers'), (dict(arm={}), "unknown key 'arm': did you mean 'arms'?")])
def test_what_is_refused_before_anything_runs(tmp_path, values, says):
    with pytest.raises(KdocrError) as e: load_sweep(write(tmp_path, **values))
    assert says in str(e.value) and 'plan.yaml' in str(e.value) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('file', sorted((ROOT/'nbs/runs').glob('*.yaml')), ids=lambda p: p.stem)
def test_shipped_experiments_can_be_run(file, capsys):
    assert main(['sweep', str(file), '--list']) == 0
    assert capsys.readouterr().out.count('steps') == len(load_sweep(file).jobs) > 9


@pytest.mark.slow
def test_the_smallest_experiment_ends_in_a_comparison_and_is_not_run_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('kdocr.sweep.run_jobs', lambda jobs, *_: [train_kd(make_config(j.params)) for j in jobs]) # the scheduler has its own tests (test_demo)
    file = write(tmp_path, base=dict(SMALL, data=drawn(), steps=4), seeds=[0])
    assert main(['sweep', str(file), '--cores', '2']) == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path/'out/compare/compare.json').read_text())
    assert 'control' in said and 'seed' in said and {a['arm'] for a in kept['arms']} >= {'control', 'seed'} and (tmp_path/'out/compare/forest.png').exists()
    before = {p: p.read_bytes() for p in (tmp_path/'out').rglob('metrics.jsonl')}
    assert sweep(load_sweep(file)) == [tmp_path/'out'/n for n in ('control-0', 'seed-0')] and before == {p: p.read_bytes() for p in before}
    assert load_config(tmp_path/'out/seed-0/config.yaml').control == 'control'
