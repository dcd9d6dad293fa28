"""What a network computes, which runs and data can be compared, and notebooks with runs that do not fit."""
import json
import shutil
from pathlib import Path
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from kdocr.core import KdocrError, read_json, write_json
from kdocr.config import load_config, save_config
from kdocr.charset import DEFAULT_CHARS, Charset
from kdocr.jobs.notebooks import run_notebook
from kdocr.analysis.figures import PAGE
from kdocr.models.restran import make_model
from kdocr.training.run_folder import RunFolder, load_checkpoint, save_checkpoint
from kdocr.analysis.finished_runs import Run, read_run
from kdocr.analysis.probe import (_CheckpointProbe, _align_probes, _layer_names, _not_comparable, _taught_by_others,
                                  as_steps, find_teacher, shared_data, load_reader, open_runs, probe)
from kdocr.analysis.errors import by_frames
from small_runs import small
from drawing import closed, lines, model, randn, seen


# ---- looking

def test_a_look_changes_nothing_and_is_the_models_own_output(model, seen):
    with torch.no_grad(): out = model.forward_taps(randn(5, 3, 3, 32, 128))
    assert torch.allclose(seen.logits, out.logits, atol=1e-4) and seen.taps.keys() == {*out.taps, 'logits'}
    for k, x in out.taps.items(): assert torch.allclose(seen.taps[k], x, atol=1e-4)
    assert not any(m._forward_hooks for m in model.modules())

def test_layers_heads_and_frames_are_seen(model, seen):
    assert list(seen.layers) == _layer_names(model) == ['backbone.stem', 'backbone.stages.0', 'backbone.stages.1', 'backbone.stages.2', 'refiner', 'encoder.0', 'encoder.1', 'head']
    assert {k: v.shape for k, v in seen.attention.items()} == {f'encoder.{i}': (5, 4, 16, 16) for i in range(2)}
    assert torch.allclose(seen.attention['encoder.1'].sum(-1), torch.ones(5, 4, 16), atol=1e-5)
    assert seen.fusion.shape == (5, 3, 16) and torch.allclose(seen.fusion.sum(1), torch.ones(5, 16), atol=1e-5)
    assert torch.allclose(seen.layers['head'], seen.logits)

def test_fusion_weights_are_those_of_the_model(model, seen):
    f = torch.randn(2, 3, 16, 72)
    with torch.no_grad(): assert torch.allclose(model.fusion.score(f).softmax(1), model.fusion.weights(f))

def test_an_unknown_layer_is_named(model):
    with pytest.raises(KdocrError, match="layer 'refinr': did you mean 'refiner'"): probe(model, randn(1, 1, 3, 32, 128), ['refinr'])

def test_a_foreign_model_shows_its_children():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    assert _layer_names(net) == ['0', '2']

def test_maps_become_lines_over_height_and_frames():
    x = torch.arange(2*3*4*8.).view(2, 3, 4, 8) # two frames of one track
    assert torch.allclose(as_steps(x, 1, 8)[0, :, 1], x[:, 1].mean((0, 1)))
    assert as_steps(x, 1, 4).shape == (1, 4, 3) and torch.allclose(as_steps(x, 1, 4)[0, 0], as_steps(x, 1, 8)[0, :2].mean(0))

def test_what_cannot_be_compared_is_said(seen):
    about = dict(charset='AB')
    bare = seen._replace(taps={k: v for k, v in seen.taps.items() if k != 'transformer_out'})
    assert _not_comparable(_CheckpointProbe(bare, about), _CheckpointProbe(seen, about)) == {'transformer_out': 'the student has no such tap'}
    assert _not_comparable(_CheckpointProbe(seen, about), _CheckpointProbe(bare, about)) == {'transformer_out': 'the teacher has no such tap'}
    assert 'AC' in _not_comparable(_CheckpointProbe(seen, dict(charset='AC')), _CheckpointProbe(seen, about))['logits']
    longer = seen._replace(taps={'logits': randn(5, 8, 37)})
    assert _align_probes({'s': longer}, seen)['s']['logits'].shape == (5, 16, 37)


# ---- whole notebooks, with runs that do not fit

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "A teacher, a control, two seeds of a distilled arm; and: unfinished, other charset, other architecture, two frames, moved data, an empty folder."
    from kdocr.training.train_kd import train_kd
    out = tmp_path_factory.mktemp('results')
    quick = dict(steps=4, eval_every=2)
    t = train_kd(small(out, name='teacher', **quick))
    def student(name, **kw): return train_kd(small(out, **{**quick, 'name': name, 'mode': 'student', 'teacher_checkpoint': str(t.published), **kw}))
    control = student('control', distill_weight=0.)
    for s in (0, 1): student(f'distilled_{s}', seed=s)
    student('charset', distill_weight=0., charset=DEFAULT_CHARS + '#', teacher_checkpoint=None)
    student('frames', distill_weight=0., frames=2, teacher_checkpoint=None)
    def copy(name, **cfg):
        shutil.copytree(control.path, out/name)
        save_config(load_config(control.config, name=name, **cfg), out/name/'config.yaml')
        return RunFolder(out/name)
    copy('unfinished').scores.unlink()
    other = copy('wide', student_model_type='restran_31m')
    torch.manual_seed(0)
    save_checkpoint(other.best, dict(load_checkpoint(control.best), model_type='restran_31m', model=make_model('restran_31m').state_dict()))
    moved = copy('moved', data=str(out/'elsewhere'))
    write_json(moved.env, dict(read_json(moved.env), data_fingerprint='0'*16))
    copy('damaged', lr=.123).best.write_bytes(b'x')
    (out/'empty').mkdir()
    return out

NAMES = ['teacher', 'control', 'distilled_0', 'distilled_1', 'charset', 'frames', 'wide', 'damaged', 'unfinished', 'moved', 'empty']

def executed(name, out, runs, **kw):
    "What the notebook printed, and the names of its figures."
    nb = nbformat.read(run_notebook(name, out, dict(runs=[str(r) for r in runs], out=str(out), **kw)), 4)
    text = ''.join(o.get('text', '') for c in nb.cells if c.cell_type == 'code' for o in c.outputs if o.output_type == 'stream' and o.name == 'stdout')
    for p in (Path(out)/'figures').glob('*.png'): assert plt.imread(p).shape[1] <= 200*PAGE + 1, f'{p.name} is wider than a page'
    return text, {p.stem for p in (Path(out)/'figures').glob('*.png')}, {p.stem for p in (Path(out)/'figures').glob('*.pdf')}

@pytest.mark.slow
def test_feature_alignment_goes_on_with_the_rest(results, tmp_path):
    text, png, pdf = executed('feature_alignment', tmp_path, [results/n for n in NAMES], plates=1, channels=1)
    for name, why in (('unfinished', 'not finished'), ('moved', 'other data'), ('empty', 'not a run folder'), ('damaged', 'damaged')): assert any(name in l and why in l for l in text.split('\n')), (name, text)
    assert "logits: its charset is" in text and "another width than the teacher's" in text and 'One frame at a time' in text and 'validation tracks, 6 students of 5 arms' in text
    assert png == pdf >= {'maps_backbone_out', 'maps_transformer_out', 'maps_logits', 'channels_under_plate', 'attention_refiner', 'by_position', 'alignment', 'layers', 'channels', 'heads', 'fusion_0', 'spikes', 'confidence', 'cka_accuracy'}

@pytest.mark.slow
def test_errors_goes_on_with_the_rest(results, tmp_path):
    text, png, pdf = executed('errors', tmp_path, [results/n for n in NAMES])
    for name, why in (('unfinished', 'not finished'), ('moved', 'other data'), ('empty', 'not a run folder'), ('damaged', 'no checkpoint')): assert any(name in l and why in l for l in text.split('\n')), (name, text)
    assert png == pdf >= {'errors_by', 'by_frames', 'confusion', 'reliability', 'changes'}

@pytest.mark.slow
def test_loss_curves_goes_on_with_the_rest(results, tmp_path):
    shutil.copytree(results/'distilled_0', tmp_path/'probed') # where the terms' gradients were measured
    rows = [json.loads(l) for l in (results/'distilled_0/metrics.jsonl').read_text().splitlines()]
    (tmp_path/'probed/metrics.jsonl').write_text(''.join(json.dumps(dict(r, kd_logits_grad=1., kd_logits_grad_cos=.1, ctc_grad=2.) if 'ctc' in r else r) + '\n' for r in rows))
    text, png, pdf = executed('loss_curves', tmp_path/'out', [tmp_path/'probed', *(results/n for n in NAMES if n != 'distilled_0')])
    assert 'empty: not a run folder' in text and any('not finished' in l and 'unfinished: at step 4' in l for l in text.split('\n'))
    assert png == pdf >= {'loss_curves', 'terms_over_runs', 'accuracy_curves', 'gradients'} and 'gradients of the terms were not measured in: ' in text

@pytest.mark.slow
def test_hardly_anything_is_enough(results, tmp_path):
    executed('feature_alignment', tmp_path, [results/'unfinished', results/'empty'])

def test_runs_on_the_same_data_are_kept_and_others_named(results):
    runs = [read_run(results/n) for n in ('moved', 'control', 'teacher')]
    data, kept, lines = shared_data(runs)
    assert [r.path.name for r in kept] == ['control', 'teacher'] and len(lines) >= 1 and all('moved' in l for l in lines) and data.fingerprint == read_json(RunFolder(results/'control').env)['data_fingerprint']
    assert find_teacher(None, kept) == RunFolder(results/'teacher').best and find_teacher(None, kept[:1]).name == 'teacher_best.pth' and find_teacher(results/'x.pth', kept) == results/'x.pth'

def test_data_found_beside_a_moved_run(results, tmp_path):
    shutil.copytree(results/'control', tmp_path/'away')
    r = read_run(tmp_path/'away')
    env = read_json(RunFolder(r.path).env)
    write_json(RunFolder(r.path).env, dict(env, data='/gone/embedded'))
    away = Run(r.path, r.cfg.model_copy(update=dict(data=Path('/gone')/'embedded')), r.parts)
    data, kept, lines = shared_data([away])
    assert data is None and kept == [] and 'away: its data are gone, there is no folder /gone/embedded nor' in lines[0]
    (tmp_path/'embedded').symlink_to(r.cfg.data)
    data, kept, lines = shared_data([away])
    assert kept == [away] and not lines and data.cfg.data == tmp_path/'embedded'

def test_of_two_folders_the_one_with_the_right_fingerprint(results, tmp_path, monkeypatch):
    "A relative path, and a folder of that name where the analysis runs: it is another's."
    from kdocr.data.synth import synth
    shutil.copytree(results/'control', tmp_path/'p/results/control')
    r = read_run(tmp_path/'p/results/control')
    env = read_json(RunFolder(r.path).env)
    write_json(RunFolder(r.path).env, {k: v for k, v in env.items() if k != 'data'})
    (tmp_path/'p/results/plates').symlink_to(r.cfg.data)
    synth(tmp_path/'plates', tracks=4, test=1, seed=9, workers=1)
    monkeypatch.chdir(tmp_path)
    run = r._replace(cfg=r.cfg.model_copy(update=dict(data=Path('plates'), out=Path('elsewhere/results'))))
    data, kept, lines = shared_data([run])
    assert kept == [run] and not lines and data.cfg.data == tmp_path/'p/results/plates' and not (tmp_path/'plates/.kdocr').exists()

def test_another_teacher_is_said(results):
    runs = [read_run(results/n) for n in ('control', 'distilled_0')]
    best = RunFolder(results/'teacher').best
    assert _taught_by_others(runs, best) == []
    line, = _taught_by_others([runs[0], runs[1]._replace(facts=dict(runs[1].facts, teacher_hash='abcd'))], best)
    assert 'distilled_0: it was taught by another teacher' in line

def test_runs_are_found_given_and_left_out_in_one_line(tmp_path, monkeypatch, capsys):
    for name in ('work/results/a', 'demo/b', 'other/c'):
        (tmp_path/name).mkdir(parents=True)
        (tmp_path/name/'config.yaml').touch()
    (tmp_path/'work/deep').mkdir()
    name = lambda p: p.name
    monkeypatch.delenv('KDOCR_RESULTS', raising=False)
    monkeypatch.chdir(tmp_path/'work/deep')
    assert open_runs(read=name) == ['a'] and open_runs(out=tmp_path/'demo', read=name) == ['b']
    monkeypatch.chdir(tmp_path/'other')
    assert open_runs([], read=name) == ['b']
    monkeypatch.setenv('KDOCR_RESULTS', str(tmp_path/'other'))
    assert open_runs('', read=name) == ['c'] and open_runs(f"{tmp_path/'demo'}, c", read=name) == ['b', 'c'] and open_runs([tmp_path/'demo/b'], read=name) == ['b']
    capsys.readouterr()
    assert open_runs(['x', 'y'], read=read_run) == []
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and out.startswith('left out: x: not a run folder') and 'y: not a run folder' in out

@pytest.mark.parametrize('together', [False, True])
def test_frames_are_read_as_evaluate_reads_them(results, together):
    from kdocr.training.evaluation import evaluate
    data, _, _ = shared_data([read_run(results/'control')])
    model, about = load_reader(RunFolder(results/('frames' if together else 'control')).best, data.split)
    part = data.open('student', dict(about, frames=2)).test
    got = by_frames(model, part, Charset(about['charset']), together, most=2)
    for k in (1, 2):
        want = evaluate(model, data.open('student', dict(about, frames=k)).test if together else part, Charset(about['charset']), torch.device('cpu'), frames=None if together else k)
        assert [(p.key, p.pred) for p in got[k]] == [(p.key, p.pred) for p in want] and [p.confidence for p in got[k]] == pytest.approx([p.confidence for p in want], abs=1e-5)
