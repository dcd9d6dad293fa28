"""The command line as a shell sees it: one line for a mistake, and a status to go by."""
import subprocess, sys
import pytest
from kdocr.cli import main, parser


def kdocr(*args, **kw): return subprocess.run([sys.executable, '-m', 'kdocr.cli', *args], capture_output=True, text=True, **kw)

def test_help_names_every_command():
    r = kdocr('--help')
    assert r.returncode == 0 and all(c in r.stdout for c in ('demo', 'synth', 'check', 'pack', 'run', 'report', 'train_kd --help'))

@pytest.mark.parametrize('command', ['demo', 'synth', 'check', 'pack', 'run', 'report'])
def test_help_of_each(command, capsys):
    with pytest.raises(SystemExit) as e: parser().parse_args([command, '--help'])
    assert e.value.code == 0 and command in capsys.readouterr().out

@pytest.mark.parametrize('args, said', [
    ([], 'COMMAND'), (['dmeo'], "invalid choice: 'dmeo'"), (['demo', '--fast'], '--fast'), (['demo', '--cores', 'two'], 'two'),
    (['run', 'train_kdd'], "notebook train_kdd: no such file: did you mean 'train_kd'?"), (['run', 'train_kd', '-p', 'step', '9'], "no parameter 'step': did you mean 'steps'?"),
    (['run', 'train_kd', '-p', 'lr', 'fast'], 'parameter lr'), (['report', '/nowhere'], '/nowhere: not a run folder'), (['check', '/nowhere'], '/nowhere')])
def test_a_mistake_is_one_line_and_status_2(args, said, capfd):
    assert main(args) == 2
    out, err = capfd.readouterr()
    assert out == '' and err.startswith('kdocr: ') and said in err and err.count('\n') == 1

def test_nothing_heavy_is_imported_for_help():
    r = subprocess.run([sys.executable, '-c', 'import sys, kdocr.cli; sys.exit(any(m in sys.modules for m in ("torch", "pandas", "matplotlib", "papermill", "cv2")))'])
    assert r.returncode == 0

def test_run_lists_parameters(capsys):
    assert main(['run', 'train_kd', '--parameters']) == 0
    assert 'distill_weight = 1.0' in capsys.readouterr().out
