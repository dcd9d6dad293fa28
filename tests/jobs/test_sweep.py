"""An experiment from one file: what it runs, what it refuses, and the whole of it in its smallest form."""
import errno
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from kdocr.cli import main
from kdocr.config import load_config
from kdocr.core import KdocrError, TemporaryFailure, Stopped, write_json
from kdocr.jobs.queue import DiskFull, JobState
from kdocr.jobs.notebooks import run_notebook
from kdocr.training.run_folder import on_disk
from kdocr.jobs.status import Status
from kdocr.jobs.sweep import _check_folders, failures, load_sweep, make_sweep, sweep
from kdocr.analysis.sweep_results import plot_results, results, results_text
from sweeping import notebook
from small_runs import SMALL, drawn

ROOT = Path(__file__).resolve().parent.parent.parent
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
    (dict(arms={}), 'no arms'), (dict(seeds=[1, 1]), 'a list of different numbers'), (dict(seeds=3), 'seeds: a list, not 3'),
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
    assert names(grid=dict(lr=[.001, 3e-2], aug_strength=[0, 1])) == ['lr=0.001,aug_strength=0', 'lr=0.001,aug_strength=1', 'lr=0.03,aug_strength=0', 'lr=0.03,aug_strength=1']
    assert names(list=[dict(lr=.1), dict(lr=.1, ema=.5), dict(name='my own', seed=3)]) == ['lr=0.1', 'lr=0.1,ema=0.5', 'my-own']
    assert names(grid=dict(lr=[.1]), seeds=[0, 7]) == ['base-0', 'base-7']
    assert names(list=[dict(data='/a/Straße 1'), dict(data='/b/c')]) == ['data=Straße-1', 'data=c'], 'one word, and safe in a shell'
    same = names(list=[dict(data='/a/x'), dict(data='/b/x')])
    assert len(set(same)) == 2 and all(n.startswith('data=x~') for n in same)
    taught = make_sweep(dict(teachers=dict(hr={}), base=dict(mode='student', teacher='hr'), grid=dict(distill_weight=[.5, 2]), seeds=[1])).jobs
    assert [(j.name, j.needs, j.steps) for j in taught] == [('hr', None, 24), ('distill_weight=0.5-1', 'hr', 24), ('distill_weight=2-1', 'hr', 24)]
    assert taught[1].params['arm'] == 'distill_weight=0.5' and taught[1].params['seed'] == 1


@pytest.mark.parametrize('plan,says', [
    (dict(), 'no arms, no grid and no list'), (dict(grid=dict(lr=[1]), list=[{}]), 'grid and list: give one of them'), (dict(grid=dict(lr=.1)), 'grid, lr: a list, not 0.1'),
    (dict(grid=[.1]), 'grid: a mapping'), (dict(list=dict(lr=.1)), 'list: a list, not {'), (dict(list=[3]), 'list, entry 1: a mapping, not 3'), (dict(list=[dict(lr=.1)] * 2), "stands there twice"),
    (dict(grid=dict(lrr=[.1])), "unknown key 'lrr'"), (dict(base=5, grid=dict(lr=[.1])), 'plan.yaml: base: a mapping, not 5'), (dict(teachers=['a'], grid=dict(lr=[.1])), "teachers: a mapping, not ['a']"),
    (dict(arms=dict(b=3)), 'arms, b: a mapping, not 3'), (dict(base=dict(teacher='hr'), grid=dict(lr=[.1])), "no teacher 'hr': the file has no teachers"), (dict(notebook='train_kdd', grid=dict(lr=[.1])), "notebook train_kdd: no such file: did you mean 'train_kd'?"),
    (dict(notebook='errors', grid=dict(run=['a'])), "no parameter 'run': did you mean 'runs'?"), (dict(grid=dict(lr=['fast'])), 'lr: Input should be a valid number'),
    (dict(teachers=dict(hr={}), list=[dict(name='hr')]), 'two runs would be called hr'), (dict(list=[dict(name='a', lr=.1), dict(name='a', lr=.2)]), 'list: two entries are called a'),
    (dict(notebook=3, grid=dict(lr=[.1])), 'plan.yaml: notebook: a name or a path, not 3'), (dict(out=['a'], grid=dict(lr=[.1])), "plan.yaml: out: a name or a path, not ['a']"), (dict(arms=['a']), "arms: a mapping, not ['a']"),
    (dict(arms=dict(a=0)), 'arms, a: a mapping, not 0'), (dict(list=[None]), 'list, entry 1: a mapping, not None'), (dict(list=[dict(name=['a'])]), "no name for a run: ['a']"),
    (dict(seeds=['a'], grid=dict(lr=[.1])), "seeds: a list of different numbers, not ['a']"), (dict(seeds=[1, 1.0], grid=dict(lr=[.1])), 'a list of different numbers'),
    (dict(teachers=dict(hr={}), base=dict(mode='student'), grid=dict(teacher=[['hr']])), "no teacher ['hr']"), (dict(teachers=dict(hr={}), base=dict(mode='student', teacher='rh'), grid=dict(lr=[.1])), "no teacher 'rh'; known: hr"),
    (dict(list=[dict(out='x', lr=.1)]), 'out: the file has one for all runs'), (dict(base=dict(name='x'), grid=dict(lr=[.1])), 'base: name: a run is called as its entry is'),
    (dict(base=dict(steps=2), arms=dict(a=dict(distill_weight=0, seed=7))), 'a: seed: `seeds` says it'), (dict(base=dict(seed=7), seeds=[0], grid=dict(lr=[.1])), 'base: seed: `seeds` says it'),
    (dict(list=[dict(arm='x', lr=.1)]), 'arm: an arm is called as its entry is'), (dict(notebook='loss_curves', arms=dict(a=dict(runs=['x']))), 'arms: loss_curves.ipynb is no training with all its settings'),
    *[(dict(list=[dict(name=n, lr=.1)]), f'no name for a run: {n!r}') for n in ('a/b', '..', '.sweep', '-x', 'compare', 'x' * 201)], *[(dict(base=dict(steps=2), arms={n: dict(distill_weight=0)}), 'no name for a run') for n in ('a/b', '..', '')],
    (dict(grid=dict(distill_terms=['logits:kll'])), "no term 'kll'")])
def test_a_grid_or_list_that_is_wrong_is_refused(plan, says):
    with pytest.raises(KdocrError) as e: make_sweep(plan, 'plan.yaml')
    assert says in str(e.value)


@pytest.mark.parametrize('text, says', [('', 'no arms, no grid and no list'), ('- lr', 'a list of `key: value` lines'), ('grid: [', 'not valid YAML'), ('grid: {lr: [1]}\ngrid: {lr: [2]}', "'grid' stands there twice"),
                                        ('arms:\n  a: {lr: 1}\n  a: {lr: 2}', "'a' stands there twice"), ('\0', 'not valid YAML'),
                                        ('notebook: plan.yaml\ngrid: {lr: [1]}', 'no Jupyter notebook')])
def test_a_file_that_says_nothing_clear_is_one_line(tmp_path, capsys, text, says):
    (tmp_path/'plan.yaml').write_text(text)
    assert main(['sweep', str(tmp_path/'plan.yaml')]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f'kdocr: {tmp_path/"plan.yaml"}: ') and says in said and said.count('\n') == 1


def test_what_is_shared_by_a_merge_key_may_be_said_anew(tmp_path):
    (tmp_path/'plan.yaml').write_text('base: {steps: 2}\nlist: [&a {lr: 1e-3, ema: 0.5}, {<<: *a, lr: 0.1}]')
    assert [j.params['lr'] for j in load_sweep(tmp_path/'plan.yaml').jobs] == ['1e-3', .1]


def test_a_number_that_yaml_takes_for_a_text_counts_as_one(tmp_path):
    assert [j.steps for j in make_sweep(dict(grid=dict(steps=['3', '1_0']))).jobs] == [3, 10]


@pytest.mark.parametrize('cores', [0, 1])
@pytest.mark.parametrize('out, says', [('file', r'file: cannot be written \(File exists\)'), ('file/sub', r'file/sub: cannot be written \(Not a directory\)'), ('shut', r'shut: cannot be written \(Permission denied\)'), ('shut/sub', r'shut/sub: cannot be written \(Permission denied\)')])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_drawn(tmp_path, monkeypatch, out, says, cores):
    (tmp_path/'file').write_text('')
    (tmp_path/'shut').mkdir(mode=0o555)
    make = Path.mkdir
    def refuse(self, *a, **kw): # as another user's folder does; root may write everywhere
        if self.parent.name == 'shut': raise PermissionError(13, 'Permission denied', str(self))
        return make(self, *a, **kw)
    monkeypatch.setattr(Path, 'mkdir', refuse)
    monkeypatch.setattr('kdocr.jobs.sweep.open_data', lambda cfg: pytest.fail('plates were drawn for nothing'))
    with pytest.raises(KdocrError, match=says): sweep(make_sweep(dict(out=str(tmp_path/out), base=SMALL, grid=dict(lr=[.1]))), cores=cores)


def test_where_a_sweep_cannot_run_is_said(tmp_path):
    plan = make_sweep(dict(out=str(tmp_path), base=SMALL, grid=dict(lr=[.1])))
    with pytest.raises(KdocrError, match="cluster 'slrum': did you mean 'slurm'?"): sweep(plan, cluster='slrum')
    with pytest.raises(KdocrError, match='cores 0: in this process, and so not in slurm'): sweep(plan, cores=0, cluster='slurm')
    assert not list(tmp_path.iterdir())


def in_turn(tmp_path, monkeypatch, fails):
    "Three trainings, none of them real: the one called `b` ends with `fails`."
    def train(cfg, ranks):
        if cfg.name == 'b': raise fails
        write_json(Path(cfg.out)/cfg.name/'scores.json', {})
    monkeypatch.setattr('kdocr.jobs.sweep.train_ranks', train)
    return sweep(make_sweep(dict(out=str(tmp_path/'out'), base=dict(SMALL, data=drawn()), list=[dict(name=n, seed=i) for i, n in enumerate('abc')])), cores=0)


def test_in_turn_one_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    rows = in_turn(tmp_path, monkeypatch, KdocrError('no such plates'))
    assert [r.state for r in rows.values()] == ['finished', 'failed', 'finished'] and failures(rows) == ['b: failed: no such plates']


@pytest.mark.parametrize('kind', [TemporaryFailure, lambda text: Stopped(15, text)])
def test_in_turn_what_lies_outside_ends_the_sweep(tmp_path, monkeypatch, kind):
    with pytest.raises(KdocrError, match='from here') as e: in_turn(tmp_path, monkeypatch, kind('the same goes on from here'))
    assert e.value.exit_code in (75, 143) and (tmp_path/'out/a').exists() and not (tmp_path/'out/c').exists()


def test_in_turn_a_full_disk_ends_the_sweep(tmp_path, monkeypatch):
    try:
        with on_disk(tmp_path/'last.pth'): raise OSError(errno.ENOSPC, 'No space left on device')
    except KdocrError as e:
        with pytest.raises(DiskFull, match='out: no space left on the disk .*last.pth.* give the same command again'): in_turn(tmp_path, monkeypatch, e)


def test_an_arm_may_go_and_another_come(tmp_path):
    "Nothing of what was made is touched, and it is not made again; a control that goes is missed."
    arms = dict(PLAN['arms'], other=dict(teacher='hr', control='control', distill_terms='logits:kl'))
    before = load_sweep(write(tmp_path, arms=arms, seeds=[0]))
    for j in before.jobs: write_json(before.out/j.name/'scores.json', {})
    del arms['seed']
    after = load_sweep(write(tmp_path, arms=dict(arms, new=dict(teacher='hr', control='control', lr=.01)), seeds=[0]))
    assert dict(zip(*results(after)[['run', 'state']].T.values)) == {'hr': 'finished', 'control-0': 'finished', 'other-0': 'finished', 'new-0': 'waiting'} and (before.out/'seed-0/scores.json').exists()
    del arms['control']
    with pytest.raises(KdocrError, match="other: no arm 'control' to be its control"): load_sweep(write(tmp_path, arms=arms))


def test_a_notebook_of_ones_own(tmp_path):
    "Defaults that are expressions, scores of another form, and a folder that was made with other values."
    file = notebook(tmp_path/'mine.ipynb', 'pass', "out = ''\nname = ''\nsteps = 2 * 5\nword = 'a'\nwide = 2 ** 3")
    def plan(**own): return make_sweep(dict(notebook=str(file), out=str(tmp_path/'out'), list=[dict(own, name='one')]))
    assert plan().jobs[0].steps is None and plan(steps='7').jobs[0].steps == 7
    with pytest.raises(KdocrError, match="parameter wide: the type of its default 2 \\*\\* 3 is unknown; annotate it in the notebook: wide: 'int'"): plan(wide=3)
    write_json(tmp_path/'out/one/scores.json', dict(test=.5, val=dict(exact_match=.25)))
    table = results(plan())
    assert list(table.state) == ['finished'] and 'exact_match' not in table and 'one finished' in results_text(table) and JobState(plan().jobs[0], tmp_path/'out').exact_match == .25
    Status(tmp_path/'out/one', params=dict(out=str(tmp_path), name='one', word='b')).end('finished')
    for own in ({}, dict(word='a')):
        with pytest.raises(KdocrError, match='one: holds another run: word is .b. and .a. here'): _check_folders(plan(**own))
    _check_folders(plan(word='b'))


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(['sweep', str(tmp_path/'none.yaml')]) == 2 and 'none.yaml: No such file' in capsys.readouterr().err
    file = write(tmp_path)
    assert main(['sweep', str(file), '--cores', '-1']) == 2 and '--cores' in capsys.readouterr().err
    assert main(['sweep', str(file), '--mem', '4']) == 2 and '--mem: only for SLURM; add --cluster slurm' in capsys.readouterr().err


@pytest.mark.slow
def test_the_smallest_experiment_ends_in_a_comparison_and_is_not_run_twice(tmp_path, capsys):
    file = write(tmp_path, base=dict(SMALL, data=drawn(), steps=4), seeds=[0])
    assert main(['sweep', str(file), '--cores', '0']) == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path/'out/compare/compare.json').read_text())
    assert 'control' in said and 'seed' in said and {a['arm'] for a in kept['arms']} >= {'control', 'seed'} and (tmp_path/'out/compare/forest.png').exists()
    before = {p: p.read_bytes() for p in (tmp_path/'out').rglob('metrics.jsonl')}
    assert failures(sweep(load_sweep(file), cores=1)) == [] and before == {p: p.read_bytes() for p in before}
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
    assert (tmp_path/'out/sweep.csv').read_text().startswith('run,state,lr,mode,part,n,exact_match,cer\n')


def test_dots_stand_at_their_scores_and_seeds_share_a_line(tmp_path):
    plan = make_sweep(dict(out=str(tmp_path), seeds=[0, 1], base=dict(steps=8), grid=dict(lr=[.001, .003])))
    for n, exact_match in zip(plan.students, (.2, .5, .4)): write_json(tmp_path/n/'scores.json', dict(test=dict(n=50, exact_match=exact_match, cer=.1)))
    table = results(plan)
    assert list(table.state) == ['finished'] * 3 + ['waiting'] and list(table.lr) == ['0.001', '0.003'] * 2
    ax = plot_results(table)
    assert [t.get_text() for t in ax.get_yticklabels()] == ['lr=0.001', 'lr=0.003'] and [sorted(c.get_offsets()[:, 0]) for c in ax.collections] == [[20, 40], [50]]
    assert 'n = 50 tracks, test (bar: mean over seeds)' in ax.get_xlabel() and [t.get_text() for t in ax.texts] == ['30.0', '50.0']


@pytest.mark.slow
@pytest.mark.parametrize('name, given, says, figure', [('sweep', {}, 'lr=0.005 finished', 'figures/sweep.png'), ('ablate_taps', dict(steps=2, teacher_steps=2, synth_tracks=24, synth_test=6, val_frac=.3, batch_size=8), 'backbone+logits against none', 'figures/taps.png')])
def test_run_notebooks_end_in_a_table_and_a_figure(name, given, says, figure, tmp_path):
    nb = nbformat.read(run_notebook(name, tmp_path, dict(out=tmp_path, **given)), 4)
    assert says in ' '.join(str(o.get('text', '')) for c in nb.cells if c.cell_type == 'code' for o in c.outputs) and (tmp_path/figure).exists()


def test_a_full_disk_is_status_75(tmp_path, monkeypatch, capsys):
    "EX_TEMPFAIL: the same command works later."
    def full(*a, **kw): raise DiskFull(f'{tmp_path}: no space left on the disk')
    monkeypatch.setattr('kdocr.jobs.sweep.run_jobs', full)
    assert main(['sweep', str(write(tmp_path, base=dict(SMALL, data=drawn())))]) == 75 and 'no space left' in capsys.readouterr().err
