"""What runs elsewhere: workflows that parse and name commands that exist, and the site made of the notebooks."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdocr.cli import app
from kdocr.jobs.notebooks import check_parameters, notebook_path, parameters

ROOT = Path(__file__).resolve().parent.parent
FLOWS = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((ROOT/'.github/workflows').glob('*.yml'))}


def steps(flow): return [s for job in flow['jobs'].values() for s in job['steps']]


def commands(flow):
    "Every call of `kdocr` in it, the values of its inputs put in."
    given = {k.upper(): v['default'] for k, v in (flow[True].get('workflow_dispatch') or {}).get('inputs', {}).items()}
    for s in steps(flow):
        for line in s.get('run', '').splitlines():
            if line.strip().startswith('kdocr '): yield shlex.split(re.sub(r'\$(\w+)', lambda m: given[m[1]], line))[1:]


def test_the_workflows_that_there_should_be(): assert FLOWS.keys() >= {'test', 'gpu', 'docs'}


@pytest.mark.parametrize('name', FLOWS)
def test_a_workflow_is_whole(name):
    flow = FLOWS[name]
    assert flow['name'] == name and flow[True] and flow['jobs'] # YAML 1.1 reads the key `on` as true
    assert all(('run' in s) != ('uses' in s) and (('uses' not in s) or re.fullmatch(r'[\w-]+/[\w-]+@v\d+', s['uses'])) for s in steps(flow))
    assert not [s for s in steps(flow) if '${{ inputs' in s.get('run', '')], 'what a person types goes through the environment, never into a script'


def test_tests_run_on_every_python_and_check_that_notebooks_and_modules_agree():
    job = FLOWS['test']['jobs']['test']
    assert job['strategy']['matrix']['python'] == ['3.10', '3.11', '3.12', '3.13']
    assert any('nbdev_export && nbdev_clean && git diff --exit-code' in s.get('run', '') for s in job['steps']) and any('pytest' in s.get('run', '') for s in job['steps'])


@pytest.mark.parametrize('name', FLOWS)
def test_its_commands_exist_and_their_parameters_are_declared(name):
    for words in commands(FLOWS[name]):
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        if words[0] == 'run': check_parameters(notebook_path(bound.arguments['notebook']), dict(bound.arguments['p']))


def test_the_gpu_workflow_is_by_hand_and_keeps_what_a_failed_run_left():
    flow = FLOWS['gpu']
    assert list(flow[True]) == ['workflow_dispatch'] and flow['jobs']['gpu']['runs-on'] == ['self-hosted', 'gpu']
    kept = steps(flow)[-1]
    assert kept['if'] == 'always()' and kept['with']['path'] == 'results'
    assert [w[:2] for w in commands(flow)] == [['synth', 'plates'], ['run', 'train_kd'], ['run', 'train_kd'], ['run', 'ablate_taps'], ['report', 'results/teacher']]


@pytest.mark.slow
def test_the_site_has_every_notebook_and_module_and_no_broken_link(tmp_path):
    built = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    notebooks = [p.relative_to(ROOT/'nbs').with_suffix('') for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    assert not [n for n in notebooks if not (tmp_path/n/'index.html').is_file()]
    assert 'class="jp-' in (tmp_path/'02_charset/index.html').read_text() and 'TrainerDistill' in (tmp_path/'api/kdocr.training.distillation/index.html').read_text()
    home = (tmp_path/'index.html').read_text()
    links = [l for l in re.findall(r'(?:href|src)="?((?!https?:|#|data:)[^" >]+)', home) if not l.startswith('{')]
    assert len(links) > 80 and not [l for l in links if not (tmp_path/l.split('#')[0].split('?')[0]).exists()]
