"""What runs elsewhere: workflows that parse and name commands that exist, and the site made of the notebooks."""
import importlib.util
import re
import shlex
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


def test_the_site_shows_notebooks_with_their_outputs_and_its_links_lead_somewhere(tmp_path):
    spec = importlib.util.spec_from_file_location('docs', ROOT/'.github/docs.py')
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    index = docs.build(tmp_path, only={'02_charset', 'loss_curves'}).read_text()
    page = (tmp_path/'nbs/02_charset.html').read_text()
    assert '<h1 id="charset">' in page and 'jp-OutputArea-output' in page and 'kdocr: charset' in page
    local = [l for l in re.findall(r'(?:href|src)="((?!https?:|#)[^"]+)"', index)]
    assert 'nbs/analysis/loss_curves.html' in local and not [l for l in local if not (tmp_path/l).exists()]
