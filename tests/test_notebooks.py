"""papermill runs: parameters checked before, the executed notebook kept, a kernel that can be interrupted; and the shipped notebooks."""
import signal, subprocess, sys, time
from pathlib import Path
import nbformat
import pytest
from kdocr.core import KdocrError
from kdocr.config import Config
from kdocr.notebooks import NotebookRun, check_parameters, interrupt, notebook_path, parameters, run_notebook, shipped_notebooks


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

def test_values_arrive_and_the_notebook_is_kept(notebook, tmp_path):
    kept = run_notebook(notebook, tmp_path/'out {x}', {'lr': '1e-3', 'runs': 'a'})
    assert kept == tmp_path/'out {x}/n.ipynb' and outputs(kept) == [f"[0.001, None, None, 'random', ['{Path('a').absolute()}'], 3, False]\n"]

def test_a_failing_notebook_is_kept(tmp_path):
    with pytest.raises(KdocrError, match=r'bad.ipynb, cell 1: ZeroDivisionError: division by zero \(kept: '): run_notebook(write(tmp_path/'bad.ipynb', 'x = 0', '1 / x'), tmp_path/'out')
    assert 'ZeroDivisionError' in outputs(tmp_path/'out/bad.ipynb')

def test_a_dead_kernel_is_said(tmp_path):
    with pytest.raises(KdocrError, match='its kernel died'): run_notebook(write(tmp_path/'dies.ipynb', 'x = 0', 'import os; os._exit(9)'), tmp_path/'out')

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
    interrupt([run])
    assert run.done() and (tmp_path/'saved').exists() and 'KeyboardInterrupt' in outputs(tmp_path/'kept.ipynb')

def test_a_kernel_does_not_outlive_its_caller(tmp_path):
    nb = write(tmp_path/'slow.ipynb', 'x = 0', f'import os, pathlib, time\npathlib.Path({str(tmp_path/"pid")!r}).write_text(str(os.getpid()))\ntime.sleep(600)')
    caller = subprocess.Popen([sys.executable, '-m', 'kdocr.cli', 'run', str(nb)], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path/'pid').exists() or not (tmp_path/'pid').read_text(): time.sleep(.1)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    for _ in range(100):
        if not alive(int((tmp_path/'pid').read_text())): return
        time.sleep(.1)
    pytest.fail('the kernel lives on')

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split(') ')[1][0] != 'Z'
    except FileNotFoundError: return False


def test_shipped_notebooks_are_found_by_name():
    assert {'train_kd', 'loss_curves', 'feature_alignment', 'benchmark'} <= shipped_notebooks().keys()
    assert notebook_path('loss_curves') == notebook_path('analysis/loss_curves.ipynb') == notebook_path('nbs/analysis/loss_curves')
    with pytest.raises(KdocrError, match="did you mean 'train_kd'"): notebook_path('trainkd')
    with pytest.raises(KdocrError, match='no such file'): notebook_path('elsewhere/train_kd.ipynb')

@pytest.mark.parametrize('name', sorted(shipped_notebooks()))
def test_the_parameters_tag_is_there(name): assert parameters(shipped_notebooks()[name])

def test_what_the_config_can_say_the_run_notebook_can():
    assert parameters(notebook_path('train_kd')).keys() == Config.model_fields.keys()

@pytest.mark.parametrize('name', ['loss_curves', 'feature_alignment'])
def test_analysis_without_runs_says_how_to_make_some(name, tmp_path):
    assert 'kdocr demo' in ' '.join(outputs(run_notebook(name, tmp_path, {'out': tmp_path})))
