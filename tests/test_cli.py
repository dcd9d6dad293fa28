"""The command line as a shell sees it: one line for a mistake, and a status to go by."""
import json, re, subprocess, sys
import pytest
from kdocr.cli import app, main
from kdocr.training.command import train_app


COMMANDS = ['demo', 'synth', 'check', 'pack', 'read', 'run', 'sweep', 'ls', 'compare', 'report', 'submit', 'export',
            'bench', 'notebooks']

def kdocr(*args, **kw): return subprocess.run([sys.executable, '-m', 'kdocr', *args], capture_output=True, text=True, **kw)

def test_help_names_every_command():
    r = kdocr('--help')
    assert r.returncode == 0 and all(c in r.stdout for c in (*COMMANDS, 'train_kd --help'))

@pytest.mark.parametrize('command', COMMANDS)
def test_help_of_each(command, capsys):
    assert main([command, '--help']) == 0
    assert f'Usage: kdocr {command}' in capsys.readouterr().out

def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0 and 'Usage: kdocr COMMAND' in capsys.readouterr().out

def test_the_version_is_that_of_the_package(capsys):
    from kdocr import __version__
    assert main(['--version']) == 0 and capsys.readouterr().out == f'{__version__}\n'

@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
@pytest.mark.parametrize('command', ['kdocr', 'train_kd'])
def test_shells_complete_commands_and_flags(command, shell):
    script, words = {'kdocr': (app, ['sweep', 'tta-below']), 'train_kd': (train_app, ['teacher-checkpoint'])}[command]
    script = script.generate_completion(shell=shell)
    assert all(word in script for word in words)

def test_notebooks_are_copied_out_and_never_overwritten(tmp_path, capsys):
    assert main(['notebooks', str(tmp_path/'new')]) == 0
    assert (tmp_path/'new/00_tour.ipynb').is_file() and (tmp_path/'new/runs/train_kd.ipynb').is_file()
    (tmp_path/'new/00_tour.ipynb').write_text('mine')
    assert main(['notebooks', str(tmp_path/'new')]) == 2
    assert (tmp_path/'new/00_tour.ipynb').read_text() == 'mine' and 'exists already' in capsys.readouterr().err

@pytest.mark.parametrize('args, said', [
    (['dmeo'], 'Unknown command "dmeo". Did you mean "demo"?'), (['demo', '--quik'], 'Did you mean --quick?'), (['demo', '--cores', 'two'], 'two'),
    (['sweep', 'f.yaml', '--cluster', 'slrum'], 'Did you mean "slurm"?'), (['synth', 'd', 'e'], "['e']"),
    (['run', 'train_kdd'], "notebook train_kdd: no such file: did you mean 'train_kd'?"), (['run', 'train_kd', '-p', 'step', '9'], "no parameter 'step': did you mean 'steps'?"),
    (['run', 'train_kd', '-p', 'lr', 'fast'], 'parameter lr'), (['report', '/nowhere'], '/nowhere: not a run folder'), (['check', '/nowhere'], '/nowhere'), (['sweep', 'f.yaml', '--gpus', '-1'], '--gpus'), (['synth', 'd', '--tracks', '-5'], '--tracks'), (['check', ''], 'an empty path'), (['submit', ''], 'an empty path'), (['export', 'x', '--data', ''], '--data: an empty path'), (['compare'], 'RUNS'), (['compare', ''], 'an empty path'), (['submit', 'd', '--ckpt', 'a', ''], 'an empty path'), (['compare', '/nowhere'], '/nowhere: not a run folder')])
def test_a_mistake_is_one_line_and_status_2(args, said, capfd):
    assert main(args) == 2
    out, err = capfd.readouterr()
    assert out == '' and err.startswith('kdocr: ') and said in err and err.count('\n') == 1

def test_nothing_heavy_is_imported_for_help():
    r = subprocess.run([sys.executable, '-c', 'import sys, kdocr.cli; sys.exit(any(m in sys.modules for m in ("torch", "pandas", "matplotlib", "papermill", "cv2")))'])
    assert r.returncode == 0

def test_help_of_run_names_every_shipped_notebook(capsys):
    from kdocr.jobs.notebooks import _shipped_notebooks
    main(['run', '--help'])
    said = capsys.readouterr().out
    assert set(_shipped_notebooks()) <= set(re.findall(r'\w+', said))

def test_run_lists_parameters(capsys):
    assert main(['run', 'train_kd', '--parameters']) == 0
    assert 'distill_weight = 1.0' in capsys.readouterr().out

@pytest.mark.parametrize('value', ['[1,2]', '{"a": 1}', '', '-1', '--b'])
def test_a_parameter_reaches_the_notebook_as_it_was_written(value):
    words = ['run', 'n', '-p', 'x', value, '-p', 'y', '2']
    assert app.parse_args(words, exit_on_error=False)[1].arguments['p'] == [('x', value), ('y', '2')]

@pytest.fixture
def results(tmp_path):
    "Two arms of three seeds, one run that is still going."
    from kdocr.config import Config
    from kdocr.metrics import Prediction
    from kdocr.training.run_folder import RunFolder
    for arm, right in (('ctc', (60, 58, 62)), ('soft', (70, 69, 71))):
        for seed, n in enumerate(right):
            cfg = Config(name=f'{arm}_{seed}', out=tmp_path/'results', mode='student', arm=arm, seed=seed, control='ctc', teacher_checkpoint='t.pth', distill_weight=float(arm == 'soft'))
            run = RunFolder(cfg.out/cfg.name)
            run.claim(cfg, {}, {})
            run.finish({'test': [Prediction(f't{i}', f'A{i}', f'A{i}' if i < n else '', .9) for i in range(100)]})
    RunFolder(tmp_path/'results/begun').claim(cfg, {}, {})
    return tmp_path/'results'

def test_compare_prints_and_keeps(results, tmp_path, capsys):
    assert main(['compare', str(results), '--out', str(tmp_path/'c')]) == 0
    out, err = capsys.readouterr()
    assert err == f'kdocr: {results}/begun: not finished, left out\n'
    assert [l.split()[0] for l in out.splitlines()[:3]] == ['arm', 'soft', 'ctc'] and out.splitlines()[2].endswith('control') and 'soft: better than its control ctc, +10.0 points over 3 seeds' in out
    kept = json.loads((tmp_path/'c/compare.json').read_text())
    assert kept['gains'][0]['judged'] == 'better' and kept['unfinished'] == [f'{results}/begun'] and kept['arms'][0]['runs'][2]['folder'] == f'{results}/soft_2'
    assert (tmp_path/'c/forest.png').read_bytes()[1:4] == b'PNG' and (tmp_path/'c/forest.pdf').is_file() and f'{tmp_path}/c/compare.json' in out

def test_compare_without_a_gain_draws_nothing(results, tmp_path, capsys):
    assert main(['compare', *(str(results/f'soft_{s}') for s in range(3)), '--out', str(tmp_path/'c')]) == 0
    assert 'no control' in capsys.readouterr().out and [p.name for p in (tmp_path/'c').iterdir()] == ['compare.json']

@pytest.mark.parametrize('args, said', [(['RESULTS', '--control', 'cct'], "--control cct: no such arm among the runs: did you mean 'ctc'?"), (['RESULTS', 'RESULTS/ctc_0'], 'ctc_0: given twice'),
                                        (['RESULTS/begun'], 'no finished student')])
def test_compare_refuses_in_one_line(results, tmp_path, capsys, args, said):
    assert main(['compare', *(a.replace('RESULTS', str(results)) for a in args), '--out', str(tmp_path/'c')]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path/'c').exists()

def test_a_pipe_is_never_replaced(tmp_path):
    "As root, `--out /dev/null` would otherwise take the device away."
    import os
    from kdocr.core import atomic_write
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(OSError, match='not a regular file'):
        with atomic_write(tmp_path/'pipe') as tmp: tmp.write_text('x')
    assert [p.name for p in tmp_path.iterdir()] == ['pipe'] and (tmp_path/'pipe').is_fifo()
