"""A sweep in a real SLURM of one machine: arrays, a job that another one preempts, and a command that finds its jobs again."""
import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from kdocr.cli import main
from kdocr.core import KdocrError, read_json
from kdocr.jobs.queue import Job, Slurm, _JobProcess, run_jobs
from kdocr.training.run_folder import RunFolder
from kdocr.training.train_kd import train_kd
from slurm_cluster import absent, cluster
from sweeping import quick
from small_runs import SMALL, drawn, same_end, small

needs_slurm = pytest.mark.skipif(bool(absent()), reason=absent() or 'SLURM is here')
BASE = dict(SMALL, steps=24, checkpoint_every=4, eval_every=12, log_every=2)


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp('slurm')) as env: yield dict(env, **{k: v for k, v in quick(tmp_path_factory.mktemp('env')).items() if k in ('PYTHONPATH', 'OMP_NUM_THREADS')})


def squeue(env): return subprocess.run(['squeue', '-h', '-r', '-n', 'kdocr', '-o', '%i'], env=env, capture_output=True, text=True).stdout.split('\n')[:-1]


def until(true, what, seconds=180):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, what
        time.sleep(.1)
    return found


@needs_slurm
@pytest.mark.slow
def test_an_array_with_a_preempted_job_ends_as_if_nothing_had_been(slurm, tmp_path):
    "A teacher, then two students as one array; while they train an urgent job takes the machine from them, and the command is interrupted and given again."
    out, file = tmp_path/'out', tmp_path/'plan.yaml'
    arms = dict(control=dict(teacher='hr', distill_weight=0), taught=dict(teacher='hr', control='control'))
    file.write_text(yaml.safe_dump(dict(out=str(out), seeds=[0], base=dict(BASE, data=drawn()), teachers=dict(hr=dict(steps=6)), arms={k: dict(v, steps=40) for k, v in arms.items()})))
    sweep = [sys.executable, '-m', 'kdocr', 'sweep', str(file), '--cluster', 'slurm', '--partition', 'main', '--time', '30', '--mem', '0.2']
    first = subprocess.Popen(sweep, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    students = [RunFolder(out/'control-0'), RunFolder(out/'taught-0')]
    until(lambda: students[0].last.exists() or students[1].last.exists() or first.poll() is not None, 'a student trains')
    subprocess.run(['sbatch', '-p', 'urgent', '--exclusive', '-o', '/dev/null', '--wrap', 'sleep 1'], env=slurm, check=True, capture_output=True)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=60)
    assert first.returncode == 130 and '2 jobs stay in SLURM and are found again' in said[1], said
    there = squeue(slurm)
    assert len(there) == 2 and len({j.split('_')[0] for j in there}) == 1 and {j.split('_')[1] for j in there} == {'0', '1'}, 'one array'
    second = subprocess.run(sweep, env=slurm, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stdout + second.stderr
    assert 'hr: ' not in second.stdout.split('waiting')[0], 'what was finished is left alone'
    restarts = {r.path.name: len(read_json(r.env)['starts']) for r in students}
    assert max(restarts.values()) == 2, f'one was preempted, requeued and begun again: {restarts}'
    assert not squeue(slurm) and json.loads((out/'compare/compare.json').read_text())['tracks']

    teacher = train_kd(small(tmp_path/'whole', name='hr', mode='teacher', **{**BASE, 'steps': 6}))
    assert same_end(teacher, RunFolder(out/'hr'))
    for r, arm in zip(students, ('control', 'taught')):
        whole = train_kd(small(tmp_path/'whole', mode='student', name=f'{arm}-0', arm=arm, control='' if arm == 'control' else 'control', teacher_checkpoint=str(teacher.published),
                               distill_weight=float(arm == 'taught'), **{**BASE, 'steps': 40}))
        assert same_end(whole, r), f'{arm}: the same scores, weights and log'


@needs_slurm
@pytest.mark.slow
def test_what_fails_in_slurm_is_said_and_takes_its_dependents_with_it(slurm, tmp_path, monkeypatch):
    from sweeping import notebook
    for k in ('SLURM_CONF', 'PYTHONPATH'): monkeypatch.setenv(k, slurm[k])
    job = lambda name, needs=None, **kw: Job(name, 3, dict(out=str(tmp_path/'out'), name=name, steps=3, pace=0, **kw), needs)
    rows = run_jobs([job('good'), job('broken', broken=True), job('pupil', 'broken'), job('after', 'good')], tmp_path/'out', notebook(tmp_path/'n.ipynb'), go_on=True, cluster='slurm', partition='main', time=5)
    assert {n: r.state for n, r in rows.items()} == dict(good='finished', broken='failed', pupil='skipped', after='finished')
    assert 'n.ipynb, cell 2: ZeroDivisionError' in rows['broken'].error and rows['pupil'].error == 'it needs broken, which has failed'


def programs(folder, monkeypatch, **scripts):
    "A PATH that has these alone."
    folder.mkdir()
    for name, script in scripts.items(): (folder/name).write_text(f'#!/bin/sh\n{script}\n'); (folder/name).chmod(0o755)
    monkeypatch.setenv('PATH', str(folder))
    return folder


SILENT = 'echo "squeue: error: no controller" >&2; echo "squeue: fatal: it is away" >&2; exit 1'


def test_without_slurm_the_cure_is_said(tmp_path, monkeypatch):
    programs(tmp_path/'bin', monkeypatch, squeue='exit 0')
    with pytest.raises(KdocrError, match='no sbatch, scancel, srun on this machine.*--cluster local'): run_jobs([Job('a', 1, {})], tmp_path, 'train_kd', cluster='slurm')


def test_a_cluster_that_is_not_set_up_is_one_line_and_nothing_is_begun(tmp_path, monkeypatch, capfd):
    programs(tmp_path/'bin', monkeypatch, squeue=SILENT, sbatch='exit 0', scancel='exit 0', srun='exit 0')
    (tmp_path/'plan.yaml').write_text(yaml.safe_dump(dict(out=str(tmp_path/'out'), base=SMALL, grid=dict(lr=[.1]))))
    monkeypatch.setattr('kdocr.jobs.sweep.open_data', lambda cfg: pytest.fail('plates were drawn for nothing'))
    assert main(['sweep', str(tmp_path/'plan.yaml'), '--cluster', 'slurm']) == 2
    said = capfd.readouterr()
    assert said.err == 'kdocr: cluster slurm: squeue refuses: no controller; it is away. Is SLURM set up on this machine? --cluster local needs none\n' and not said.out
    assert not list((tmp_path/'out').glob('[!.]*'))


def test_what_sbatch_refuses_is_one_line(tmp_path, monkeypatch, capfd):
    programs(tmp_path/'bin', monkeypatch, squeue='exit 0', scancel='exit 0', srun='exit 0', sbatch='echo "sbatch: error: invalid partition specified: mian" >&2; exit 1')
    with pytest.raises(KdocrError) as e: run_jobs([Job('a', 1, {})], tmp_path/'out', 'train_kd', cluster='slurm', partition='mian')
    assert str(e.value) == 'cluster slurm: sbatch refuses: invalid partition specified: mian' and not capfd.readouterr().err
    programs(tmp_path/'more', monkeypatch, sinfo='echo main; echo urgent', **{p: (tmp_path/'bin'/p).read_text().split('\n', 1)[1] for p in ('squeue', 'sbatch', 'scancel', 'srun')})
    with pytest.raises(KdocrError, match="specified: mian: did you mean 'main'?"): run_jobs([Job('a', 1, {})], tmp_path/'out', 'train_kd', cluster='slurm', partition='mian')


def test_a_controller_that_is_away_for_a_moment_takes_no_job_for_lost(tmp_path, monkeypatch):
    "Neither those that it named before, nor those that were sent since; one that never answered is no empty queue."
    bin = programs(tmp_path/'bin', monkeypatch, squeue='echo 7 RUNNING; echo 8_1 PENDING', sbatch='echo Submitted batch job 9', scancel='exit 0', srun='exit 0')
    slurm = Slurm(tmp_path/'jobs')
    assert slurm.present() == {'7': 'running', '8_1': 'queued'}
    (bin/'squeue').write_text(f'#!/bin/sh\n{SILENT}\n')
    assert slurm.submit([_JobProcess(Job(n, 1, {}), tmp_path/'n.ipynb', tmp_path) for n in 'ab']) == ['9_0', '9_1']
    assert slurm.present() == {'7': 'running', '8_1': 'queued', '9_0': 'queued', '9_1': 'queued'}
    with pytest.raises(KdocrError, match='squeue refuses: no controller'): Slurm(tmp_path/'jobs')
