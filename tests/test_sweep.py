"""An experiment from one file: what it runs, what it refuses, and the whole of it in its smallest form."""
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from kdocr.cli import main
from kdocr.config import load_config
from kdocr.core import KdocrError, write_json
from kdocr.jobs import Full
from kdocr.notebooks import run_notebook
from kdocr.sweep import faults, load_sweep, make_sweep, plot_results, results, sweep
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


def test_a_grid_and_a_list_are_named_by_what_differs(tmp_path):
    def names(**values): return [j.name for j in make_sweep(dict(out=str(tmp_path), **values)).jobs]
    assert names(grid=dict(lr=[.001, 3e-2], augment=[0, 1])) == ['lr=0.001,augment=0', 'lr=0.001,augment=1', 'lr=0.03,augment=0', 'lr=0.03,augment=1']
    assert names(list=[dict(lr=.1), dict(lr=.1, ema=.5), dict(name='my own', seed=3)]) == ['lr=0.1', 'lr=0.1,ema=0.5', 'my-own']
    assert names(grid=dict(lr=[.1]), seeds=[0, 7]) == ['base-0', 'base-7']
    assert names(list=[dict(data='/a/Straße 1'), dict(data='/b/c')]) == ['data=Straße-1', 'data=c'], 'one word, and safe in a shell'
    same = names(list=[dict(data='/a/x'), dict(data='/b/x')])
    assert len(set(same)) == 2 and all(n.startswith('data=x~') for n in same)
    taught = make_sweep(dict(teachers=dict(hr={}), base=dict(mode='student', teacher='hr'), grid=dict(distill_weight=[.5, 2]), seeds=[1])).jobs
    assert [(j.name, j.needs, j.steps) for j in taught] == [('hr', None, 24), ('distill_weight=0.5-1', 'hr', 24), ('distill_weight=2-1', 'hr', 24)]
    assert taught[1].params['arm'] == 'distill_weight=0.5' and taught[1].params['seed'] == 1


@pytest.mark.parametrize('plan,says', [
    (dict(), 'no arms, no grid and no list'), (dict(grid=dict(lr=[1]), list=[{}]), 'grid and list: give one of them'), (dict(grid=dict(lr=.1)), 'grid, lr: a list of values, not 0.1'),
    (dict(grid=[.1]), 'grid: a mapping'), (dict(list=dict(lr=.1)), 'list: a list of mappings'), (dict(list=[3]), 'list, entry 1: a mapping, not 3'), (dict(list=[dict(lr=.1)] * 2), "stands there twice"),
    (dict(grid=dict(lrr=[.1])), "unknown key 'lrr'"), (dict(base=5, grid=dict(lr=[.1])), 'plan.yaml: base: a mapping, not 5'), (dict(teachers=['a'], grid=dict(lr=[.1])), "teachers: a mapping, not ['a']"),
    (dict(arms=dict(b=3)), 'arms, b: a mapping, not 3'), (dict(base=dict(teacher='hr'), grid=dict(lr=[.1])), "no teacher 'hr': the file has no teachers"), (dict(notebook='train_kdd', grid=dict(lr=[.1])), "notebook train_kdd: no such file: did you mean 'train_kd'?"),
    (dict(notebook='errors', grid=dict(run=['a'])), "no parameter 'run': did you mean 'runs'?"), (dict(grid=dict(lr=['fast'])), 'lr: Input should be a valid number'),
    (dict(teachers=dict(hr={}), list=[dict(name='hr')]), 'two runs would be called hr'), (dict(grid=dict(distill_terms=['logits:kll'])), "no term 'kll'")])
def test_a_grid_or_list_that_is_wrong_is_refused(plan, says):
    with pytest.raises(KdocrError) as e: make_sweep(plan, 'plan.yaml')
    assert says in str(e.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(['sweep', str(tmp_path/'none.yaml')]) == 2 and 'none.yaml: No such file' in capsys.readouterr().err
    file = write(tmp_path)
    assert main(['sweep', str(file), '--cores', '-1']) == 2 and '--cores' in capsys.readouterr().err
    assert main(['sweep', str(file), '--mem', '4']) == 2 and '--mem: a local sweep asks for nothing' in capsys.readouterr().err


@pytest.mark.slow
def test_the_smallest_experiment_ends_in_a_comparison_and_is_not_run_twice(tmp_path, capsys):
    file = write(tmp_path, base=dict(SMALL, data=drawn(), steps=4), seeds=[0])
    assert main(['sweep', str(file), '--cores', '0']) == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path/'out/compare/compare.json').read_text())
    assert 'control' in said and 'seed' in said and {a['arm'] for a in kept['arms']} >= {'control', 'seed'} and (tmp_path/'out/compare/forest.png').exists()
    before = {p: p.read_bytes() for p in (tmp_path/'out').rglob('metrics.jsonl')}
    assert faults(sweep(load_sweep(file), cores=1)) == [] and before == {p: p.read_bytes() for p in before}
    assert load_config(tmp_path/'out/seed-0/config.yaml').control == 'control'
    capsys.readouterr()
    assert main(['sweep', str(file), '--list']) == 0 and capsys.readouterr().out.splitlines()[1] == 'control-0: 4 steps, finished'
    with pytest.raises(KdocrError, match='hr: holds another run: lr is 0.003 and 0.1 here'): sweep(load_sweep(write(tmp_path, base=dict(SMALL, data=drawn(), steps=4, lr=.1), seeds=[0])), cores=1)


@pytest.mark.slow
def test_a_grid_ends_in_a_table_and_a_figure_and_says_what_failed(tmp_path, capsys):
    "By processes, as users run it: one of the two cannot train, since its teacher is not there."
    file = tmp_path/'plan.yaml'
    file.write_text(yaml.safe_dump(dict(out=str(tmp_path/'out'), base=dict(SMALL, steps=4, data=drawn()), list=[dict(lr=.01), dict(name='lost', mode='student', teacher_checkpoint=str(tmp_path/'nowhere.pth'))])))
    assert main(['sweep', str(file), '--cores', '1']) == 1
    out, err = capsys.readouterr()
    name = load_sweep(file).students[0]
    assert [l.split()[:2] for l in out.splitlines()[-5:-3]] == [[name, 'finished'], ['lost', 'failed']]
    assert re.search(r'^kdocr: lost: failed: train_kd.ipynb, cell \d+: KdocrError: .*nowhere', err, re.M) and (tmp_path/'out/sweep.png').exists() and (tmp_path/'out/sweep.pdf').exists()
    assert (tmp_path/'out/sweep.csv').read_text().startswith('run,state,lr,mode,part,n,rr,cer\n')


def test_dots_stand_at_their_scores_and_seeds_share_a_line(tmp_path):
    plan = make_sweep(dict(out=str(tmp_path), seeds=[0, 1], base=dict(steps=8), grid=dict(lr=[.001, .003])))
    for n, rr in zip(plan.students, (.2, .5, .4)): write_json(tmp_path/n/'scores.json', dict(test=dict(n=50, rr=rr, cer=.1)))
    table = results(plan)
    assert list(table.state) == ['finished'] * 3 + ['waiting'] and list(table.lr) == ['0.001', '0.003'] * 2
    ax = plot_results(table)
    assert [t.get_text() for t in ax.get_yticklabels()] == ['lr=0.001', 'lr=0.003'] and [sorted(c.get_offsets()[:, 0]) for c in ax.collections] == [[20, 40], [50]]
    assert 'n = 50 tracks, test (bar: mean over seeds)' in ax.get_xlabel() and [t.get_text() for t in ax.texts] == ['30.0', '50.0']


@pytest.mark.slow
@pytest.mark.parametrize('name, given, says, figure', [('sweep', {}, 'lr=0.005 finished', 'figures/sweep.png'), ('ablate_taps', dict(steps=2, teacher_steps=2, synth_tracks=24, synth_test=6, val_share=.3, batch_size=8), 'backbone+logits against none', 'figures/taps.png')])
def test_run_notebooks_end_in_a_table_and_a_figure(name, given, says, figure, tmp_path):
    nb = nbformat.read(run_notebook(name, tmp_path, dict(out=tmp_path, **given)), 4)
    assert says in ' '.join(str(o.get('text', '')) for c in nb.cells if c.cell_type == 'code' for o in c.outputs) and (tmp_path/figure).exists()


def test_a_full_disk_is_status_75(tmp_path, monkeypatch, capsys):
    "EX_TEMPFAIL: the same command works later."
    def full(*a, **kw): raise Full(f'{tmp_path}: no space left on the disk')
    monkeypatch.setattr('kdocr.sweep.run_jobs', full)
    assert main(['sweep', str(write(tmp_path, base=dict(SMALL, data=drawn())))]) == 75 and 'no space left' in capsys.readouterr().err
