"""The demo: its plan, its order with a notebook that only counts, and the whole of it in its smallest form."""
import re, signal, subprocess, sys, time
import nbformat
import pytest
from kdocr.core import KdocrError, read_json
from kdocr.config import make_config
from kdocr.analysis.compare import control_of
from kdocr.analysis.finished_runs import read_run
from kdocr.analysis.demo import _FULL_DEMO, _QUICK_DEMO, _claim_folder, _demo_jobs
from kdocr.jobs.queue import Job, run_jobs
from kdocr.jobs.status import log_end

NAMES = ['teacher', 'random_control', 'random_distilled', 'warm_control', 'warm_distilled']

@pytest.fixture
def counting(tmp_path):
    "A notebook that writes a log and then its scores, and no more."
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')), cells=[
        nbformat.v4.new_code_cell("out = ''\nname = ''\nsteps = 1\ndata = ''", metadata=dict(tags=['parameters'])),
        nbformat.v4.new_code_cell("import json, time\nfrom pathlib import Path\nfolder = Path(out)/name\n(folder/f'started {time.time()}').touch()\nif data: 1 / 0\n"
                                  "for s in range(1, steps + 1):\n    with open(folder/'metrics.jsonl', 'a') as f: f.write(json.dumps(dict(step=s)) + '\\n')\n    time.sleep(.02)\n"
                                  "(folder/'scores.json').write_text('{}')")])
    nbformat.write(nb, tmp_path/'count.ipynb')
    return tmp_path/'count.ipynb'

def job(out, name, needs=None, steps=5, **kw): return Job(name, steps, dict(out=str(out), name=name, steps=steps, **kw), needs)
def starts(folder): return sorted(float(p.name.split()[1]) for p in folder.glob('started *'))


@pytest.mark.parametrize('plan', [_FULL_DEMO, _QUICK_DEMO])
def test_five_arms_that_differ_in_two_things(plan, tmp_path):
    made = _demo_jobs(tmp_path, tmp_path/'data', plan)
    cfgs = {j.name: make_config(j.params) for j in made}
    assert list(cfgs) == NAMES and [j.needs for j in made] == [None, None, 'teacher', 'teacher', 'teacher']
    students = [c.model_dump(exclude={'name', 'student_init', 'distill_weight', 'teacher_checkpoint'}) for c in cfgs.values() if c.mode == 'student']
    assert all(s == students[0] for s in students)
    assert [(c.student_init, c.distill_weight) for c in cfgs.values() if c.mode == 'student'] == [('random', 0), ('random', 1), ('teacher', 0), ('teacher', 1)]

def test_a_student_waits_for_its_teacher_and_a_second_call_finds_nothing_to_do(counting, tmp_path):
    todo = [job(tmp_path, 'teacher', steps=40), job(tmp_path, 'student', 'teacher'), job(tmp_path, 'control')]
    run_jobs(todo, tmp_path, counting, 2)
    end = (tmp_path/'teacher/scores.json').stat().st_mtime
    assert starts(tmp_path/'control')[0] < end <= starts(tmp_path/'student')[0] + .1
    run_jobs(todo, tmp_path, counting, 2)
    assert all(len(starts(tmp_path/j.name)) == 1 and log_end(tmp_path/j.name/'metrics.jsonl')[0]['step'] == j.steps for j in todo)

def test_what_is_finished_is_not_run_again_and_the_rest_is(counting, tmp_path):
    todo = [job(tmp_path, 'teacher'), job(tmp_path, 'student', 'teacher')]
    run_jobs(todo[:1], tmp_path, counting, 1)
    run_jobs(todo, tmp_path, counting, 1)
    assert len(starts(tmp_path/'teacher')) == len(starts(tmp_path/'student')) == 1

def test_a_failing_job_stops_the_rest(counting, tmp_path):
    todo = [job(tmp_path, 'broken', data='x'), job(tmp_path, 'long', steps=3000), job(tmp_path, 'never', 'broken')]
    with pytest.raises(KdocrError, match='count.ipynb, cell 2: ZeroDivisionError'): run_jobs(todo, tmp_path, counting, 2)
    assert not (tmp_path/'never').exists() and not (tmp_path/'long/scores.json').exists()

def test_a_folder_belongs_to_one_demo(tmp_path):
    _claim_folder(tmp_path, dict(quick=True))
    _claim_folder(tmp_path, dict(quick=True))
    with pytest.raises(KdocrError, match='quick is True there and False here'): _claim_folder(tmp_path, dict(quick=False))


@pytest.mark.slow
def test_the_quick_demo_goes_on_after_a_kill_and_tells_who_won(tmp_path):
    command = [sys.executable, '-m', 'kdocr', 'demo', '--quick', '--out', str(tmp_path/'demo')]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path/'demo/teacher/checkpoints/last.pth').exists():
        assert first.poll() is None, 'ended before its first checkpoint'
        time.sleep(.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    assert len(read_json(tmp_path/'demo/teacher/env.json')['starts']) == 2

    out = second.stdout
    assert all(arm in out for arm in ('HR teacher, reading HR', 'HR teacher, reading LR', 'random init, control', 'random init, distilled', "teacher's weights, control", "teacher's weights, distilled"))
    said = re.search(r'(Best|None) of (the )?4 students .*100 held-out', out) # so few steps may read nothing, and then it says so
    assert said and 'One seed each' in out and out.count('paired 95 % interval') == 2 and 'mean little' in out
    assert '5 of 5 finished' in second.stdout and 'Traceback' not in second.stderr

    runs = {n: read_run(tmp_path/'demo'/n) for n in NAMES}
    assert all((r.path/'train_kd.ipynb').exists() and (r.path/'figures/losses.png').exists() for r in runs.values())
    assert control_of(runs['warm_distilled'], list(runs.values())).path.name == 'warm_control'
    trained = {p.text for p in runs['teacher'].parts['val']}
    assert not trained & {p.text for p in runs['random_control'].parts['test']}

    page = (tmp_path/'demo/report.html').read_text()
    assert page.count('<img') >= 8 and page.index('class=lead') < page.index('class=strip') < page.index('<figcaption>')
    assert len(page) < 2e6 and page.count('<img') == len(re.findall('<img [^>]*alt="', page))
    assert not re.search(r'(src|href)="(?!data:|#)', page) and 'import matplotlib' not in page and 'Traceback' not in page
    assert {'arms', 'errors_by', 'loss_curves', 'maps_logits', 'alignment', 'spikes'} <= {p.stem for p in (tmp_path/'demo/report/figures').iterdir()}
