"""Explorers without a browser: what a control's move changes, what is read and when, who is left out and why; a run that is watched is the same run."""
import base64
import json
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace
import cv2
import ipywidgets as W
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import kdocr.analysis.explore as explore
from kdocr.distill.similarity import cosine_by_position
from kdocr.charset import DEFAULT_CHARS
from kdocr.config import load_config, save_config
from kdocr.core import KdocrError, read_json, write_json
from kdocr.data.batches import open_data
from kdocr.data.degrade import Conditions
from kdocr.training.networks import load_teacher
from kdocr.analysis.figures import TERM_STYLES, use_style
from kdocr.data.icpr import index_data
from kdocr.analysis.probe import HeldOut
from kdocr.analysis.curves import CurveArm, read_curve, series
from kdocr.jobs.notebooks import run_notebook
from kdocr.training.run_folder import RunFolder, load_checkpoint, save_checkpoint
from kdocr.training.train_kd import new_trainer, train_kd
from kdocr.analysis.explore import (_CAMERA, _LIGHT, _ALIGNMENT_VIEWS, _Asking, _Explorer, _Live, _Side, _LogReader,
                                    _alike, _alignment_figure, _compared, _drawn_conditions, explore_alignment,
                                    explore_runs, explore_tracks, _far_away, _figure, _track_frames, live,
                                    _live_figure, _matching, _open_index, _read_head, _run_paths, _runs_figure,
                                    _shared_taps, _the_data, _tracks_frame, _yardstick)
from small_runs import drawn, small

def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def lines(ax): return [l for l in ax.lines if not l.get_label().startswith('_')]
def said(ex): return ex.note.value
def words(fig): return ' '.join(t.get_text() for t in fig.texts)

@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    plt.close('all') # what other tests of this process left
    with matplotlib.rc_context(explore._WIDGET_LAYOUT): yield
    assert not plt.get_fignums(), 'explorers leave no figure open'
    plt.close('all')

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "A teacher, a control, a distilled student; and copies that do not fit."
    out, quick = tmp_path_factory.mktemp('results'), dict(steps=4, eval_every=2)
    t = train_kd(small(out, name='teacher', **quick))
    def student(name, **kw): return train_kd(small(out, **{**quick, 'name': name, 'mode': 'student', 'teacher_checkpoint': str(t.published), **kw}))
    student('control', distill_weight=0.)
    d = student('distilled')
    student('charset', distill_weight=0., charset=DEFAULT_CHARS + '#', teacher_checkpoint=None)
    def copy(name):
        shutil.copytree(d.path, out/name)
        save_config(load_config(d.config, name=name), out/name/'config.yaml')
        return RunFolder(out/name)
    copy('unfinished').scores.unlink()
    copy('damaged').best.write_bytes(b'x')
    moved = copy('moved')
    write_json(moved.env, dict(read_json(moved.env), data_fingerprint='0'*16))
    save_checkpoint(moved.best, dict(load_checkpoint(moved.best), split_hash='0'*16))
    (out/'empty').mkdir()
    return out


# ---- controls over one picture

class Static:
    def __init__(self): self.got = []
    def update(self, what, raw): self.got.append(base64.b64decode(what['image/png']))

def counting():
    drawn = []
    def draw(n, power):
        if n == 13: raise KdocrError('13: no such <b>luck</b>')
        drawn.append((n, power))
        fig = _figure(3, 1, .4)
        fig.subplots().plot([0, n], [0, power])
        return fig
    def adapt(c, name): c['n'].value = 3 if name == 'power' else c['n'].value
    return drawn, _Explorer({'first': dict(n=W.IntSlider(1, 0, 20)), 'second': dict(power=W.IntSlider(1, 1, 3))}, draw, adapt, ['left out: x < y'])

def test_a_move_draws_once_and_the_plain_picture_follows():
    drawn, ex = counting()
    ex.static = Static()
    first = ex.image.value
    assert first[1:4] == b'PNG' and drawn == [(1, 1)]
    ex['n'].value = 5
    ex['power'].value = 2 # which sets n as well
    assert drawn == [(1, 1), (5, 1), (3, 2)] and ex['n'].value == 3
    assert ex.static.got[-1] == ex.image.value != ex.static.got[0] != first
    assert ex.figure().axes[0].lines[0].get_ydata().tolist() == [0, 2]

def test_the_style_of_a_notebook_changes_nothing(tmp_path, recwarn):
    _, ex = counting()
    before = ex.image.value
    with matplotlib.rc_context():
        use_style(150)
        ex.redraw()
        assert ex.save(tmp_path, 'x').read_bytes()[1:4] == b'PNG' and (tmp_path/'x.pdf').stat().st_size
    assert ex.image.value == before and not [w for w in recwarn if 'layout' in str(w.message)]

def test_an_error_is_said_and_the_picture_stays():
    _, ex = counting()
    before = ex.image.value
    assert 'x &lt; y' in said(ex) and 'kdocr-error' not in said(ex)
    ex['n'].value = 13
    assert 'kdocr-error' in said(ex) and '13: no such &lt;b&gt;luck' in said(ex) and ex.image.value == before and 'kdocr-old' in ex.image._dom_classes
    ex['n'].value = 4
    assert 'kdocr-error' not in said(ex) and 'x &lt; y' in said(ex) and ex.image.value != before and 'kdocr-old' not in ex.image._dom_classes
    with pytest.raises(KdocrError, match="control 'powr': did you mean 'power'"): ex['powr']

def test_a_fault_of_the_program_is_shown_too():
    def draw(n): return _figure(1, 1) if n else 1/0
    ex = _Explorer({'': dict(n=W.IntSlider(1, 0, 3))}, draw)
    with pytest.raises(ZeroDivisionError): ex['n'].value = 0
    assert 'ZeroDivisionError' in said(ex) and not ex.quiet

def test_controls_and_a_plain_figure_are_displayed_and_only_one_is_seen(monkeypatch):
    shown, handle = [], Static()
    monkeypatch.setattr(explore, 'display', lambda what, **kw: shown.append((what, kw)) or handle)
    _, ex = counting()
    ex._ipython_display_()
    (live_, _), (plain, kw) = shown
    assert 'application/vnd.jupyter.widget-view+json' in live_ and 'image/png' not in live_ and kw['display_id']
    assert base64.b64decode(plain['image/png']) == ex.image.value and ex.static is handle
    style = ex.box.children[0].value
    assert 'kdocr-live' in ex.box._dom_classes and '.jp-OutputArea-child:has(.kdocr-live) + .jp-OutputArea-child {display: none}' in style


# ---- tracks

def test_a_folder_as_a_frame(competition):
    found, parts = _open_index(competition)
    f = _tracks_frame(found, parts)
    assert f.part.value_counts().to_dict() == dict(train=12, test=3) and f.scenario.value_counts().to_dict() == dict(A=4, B=11)
    assert f.text[_matching(f, scenario='A', layout='Mercosur')].tolist() == ['BRA2E19', 'KDO4C26']
    assert f.text[_matching(f, 'st')].tolist() == ['STU5V67'] and f.text[_matching(f, '?V?5*')].tolist() == ['AVL5215'] and f.key[_matching(f, 'TRACK_10002')].tolist() == ['track_10002']
    assert len(_matching(f, 'av')) == 1 and not len(_matching(f, 'av', part='test')) and len(_matching(f)) == 15

def test_the_split_is_known_where_there_is_one(results):
    found, parts = _open_index(drawn())
    assert set(_tracks_frame(found, parts).part) == {'train', 'val', 'test'}
    data = open_data(load_config(results/'control/config.yaml'))
    f = _tracks_frame(*_open_index(data))
    assert set(f.key[f.part == 'val']) == set(data.split.val) and len(_tracks_frame(*_open_index(found), )) == len(f)

def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(KdocrError, match='int: tracks are explored in a folder'): _open_index(3)
    with pytest.raises(KdocrError, match='nowhere: no such folder'): explore_tracks(tmp_path/'nowhere')
    with pytest.raises(KdocrError, match='no tracks in it'): explore_tracks(tmp_path)

def test_only_what_is_shown_is_read(competition, monkeypatch):
    read = []
    monkeypatch.setattr(explore, 'read_image', lambda p: read.append(p) or cv2.imread(str(p))[..., ::-1])
    _track_frames.cache_clear()
    ex = explore_tracks(competition)
    assert len(read) == 10 and len({p.parent for p in read}) == 1
    ex['noise'].value = 9.
    assert len(read) == 10
    ex['plate'].value = 4
    assert len(read) == 20
    _track_frames.cache_clear()

def test_every_control_of_the_tracks_changes_the_picture(competition):
    ex = explore_tracks(competition)
    ex['motion'].value = 4. # without motion its angle says nothing
    before = ex.image.value
    moves = [(k, hi if k != 'quality' else lo) for k, (lo, hi, *_) in (_CAMERA | _LIGHT).items()] + [('plate', 3), ('scenario', 'B'), ('layout', 'Mercosur'), ('part', 'test')]
    for name, value in moves:
        ex[name].value = value
        assert ex.image.value != before and 'kdocr-error' not in said(ex), name
        before = ex.image.value
    assert ex['plate'].value == 1 and ex['plate'].max == 2
    ex['text'].value = 'no such'
    assert 'none of 15 tracks fits the filter' in said(ex)
    ex['part'].value = ex['layout'].value = 'all'
    ex['text'].value = 'wx'
    assert 'kdocr-error' not in said(ex) and ex['plate'].max == 1
    ex['draw'].click()
    assert {k: ex[k].value for k in _drawn_conditions(0, 'B')} == pytest.approx(_drawn_conditions(0, 'B'), abs=.06)

def test_sliders_are_the_parameters_of_the_degradation():
    assert {f.name for f in fields(Conditions)} - {'cast', 'slope'} == {*_CAMERA, *_LIGHT} - {'height'}
    assert all(lo <= start <= hi for lo, hi, _, start, _ in (_CAMERA | _LIGHT).values())
    for n in range(50):
        for k, x in _drawn_conditions(n, 'AB'[n % 2]).items(): assert (_CAMERA | _LIGHT)[k][0] <= x <= (_CAMERA | _LIGHT)[k][1]

def test_degraded_by_hand(competition):
    hr = _track_frames(index_data(competition).train[0])[1][0]
    v = {k: x[3] for k, x in (_CAMERA | _LIGHT).items()}
    made = _far_away(hr, 'a', 12, v)
    assert made.shape == (12, 34, 3) and np.array_equal(made, _far_away(hr, 'a', 12, v)) and not np.array_equal(made, _far_away(hr, 'b', 12, v))
    clean = v | dict(blur=0., motion=0., contrast=0., sharpen=0., noise=0., quality=98)
    assert _far_away(hr, 'a', 30, clean | dict(exposure=.2)).mean() < .5*_far_away(hr, 'a', 30, clean).mean() # darker

def test_a_damaged_frame_is_said_and_the_rest_shown(competition):
    track = index_data(competition).train[0]
    good = explore_tracks(competition).figure()
    track.lr[1].write_bytes(track.lr[1].read_bytes()[:60])
    _track_frames.cache_clear()
    ex = explore_tracks(competition)
    fig = ex.figure()
    words = ' '.join(t.get_text() for t in fig.axes[0].texts)
    assert 'lr-002.png: truncated PNG' in words and 'LR 2: damaged' in words and 'kdocr-error' not in said(ex)
    assert len(fig.axes[0].images) == len(good.axes[0].images) - 1 == 12

def test_faults_of_the_folder_are_counted(competition):
    (competition/'train/Scenario-A/Brazilian/track_00001/hr-003.png').unlink()
    ex = explore_tracks(competition)
    assert '1 faults keep tracks out' in said(ex) and 'hr-003.png' in said(ex) and ex['plate'].max == 14


# ---- two networks

class Net(torch.nn.Module):
    def __init__(self): super().__init__(); self.calls = []
    def forward_taps(self, x):
        self.calls.append(len(x))
        y = x.flatten(1).sum(1)[:, None, None].expand(-1, 4, 2)
        return SimpleNamespace(logits=y, taps={'backbone_out': y})

class Rows:
    def __len__(self): return 100
    def batch(self, rows, step, clean): return SimpleNamespace(images=rows.float().view(-1, 1, 1, 1, 1))

def test_a_network_is_asked_in_chunks_and_once():
    net = Net()
    asking = _Asking(net, Rows(), seconds=1e9, kept=2)
    assert [float(asking[i].taps['logits'][0, 0, 0]) for i in (0, 31, 5, 99)] == [0, 31, 5, 99] and net.calls == [1, 32, 4]
    asking[0]; asking[40]; asking[0]; asking[99]
    assert net.calls == [1, 32, 4, 32, 4] # two chunks are kept
    assert asking[7].images.shape == (1, 1, 1, 1, 1)
    slow = _Asking(Net(), Rows(), seconds=0.)
    assert slow[99].taps['logits'][0, 0, 0] == 99 and slow.model.calls == [1, 1]

def test_measures_by_hand():
    t = randn(20, 6, 5)
    y = _yardstick(t)
    assert _compared('cosine', 2*t, t, y)['student'].allclose(torch.ones(20, 6)) and _compared('relative error', t, t, y)['student'].max() == 0
    assert float(_compared('relative error', torch.zeros_like(t) + y.mean, t, y)['student'].mean()) == pytest.approx(1, abs=1e-5)
    c = _compared('channel', t + 3*y.std, t, y, 2)
    assert (c['student'] - c['teacher']).allclose(torch.tensor(3.)) and float(c['teacher'].mean()) == pytest.approx(0, abs=1e-5)
    assert all(x.amax(1).allclose(torch.ones(20)) for x in _compared('attention map', randn(20, 6, 5, seed=1), t, y).values())
    assert float(_compared('entropy', torch.zeros_like(t), t, y)['student'][0, 0]) == pytest.approx(np.log(5))
    assert _compared('channel', t[..., :2], t, y, 4).keys() == {'teacher'}
    for m in ('cosine', 'relative error'):
        with pytest.raises(KdocrError, match='student .20, 6, 4. and teacher .20, 6, 5. differ'): _compared(m, t[..., :4], t, y)
    with pytest.raises(KdocrError, match="did you mean 'entropy'"): _compared('entropi', t, t, y)
    with pytest.raises(KdocrError, match='does not vary'): _yardstick(torch.ones(8, 2, 4))

def test_the_plates_line_is_the_measure(results):
    opened, _ = _the_data(drawn(), [])
    t, s = _Side(results/'teacher_best.pth', 'teacher', opened, 'teacher'), _Side(RunFolder(results/'distilled').best, 'student', opened, 'distilled')
    fig = _alignment_figure(s, t, 'val', 1, 'transformer_out', 0, 'cosine', 'plate 2 of 9')
    right = fig.axes[1]
    want = cosine_by_position(s.on('val')[0].ask(torch.tensor([1])).taps['transformer_out'], t.on('val')[0].ask(torch.tensor([1])).taps['transformer_out'])[0]
    line, = lines(right)
    assert np.allclose(line.get_ydata(), want, atol=1e-4) and line.get_color() == TERM_STYLES['transformer_out'][1] and right.get_ylabel() == 'cosine' and 'n = ' in right.get_xlabel()
    assert len(fig.axes[0].images) == 5 and t.data.val.keys[1] in words(fig) and '"distilled"' in words(fig)
    lr, hr = (x.on('val')[0][1].images for x in (s, t))
    assert not torch.equal(lr, hr) # the student sees LR, the teacher HR

def test_every_control_of_the_alignment_changes_the_picture(results):
    ex = explore_alignment(results/'teacher', [results/'control', results/'distilled'], drawn())
    before, seen = ex.image.value, {ex.image.value}
    assert ex['channel'].disabled and len(ex['student'].options) == 2 and not ex['which'].disabled
    for name, value in (('plate', 2), ('tap', 'logits'), ('measure', 'entropy'), ('measure', 'channel'), ('channel', 5), ('part', 'train'), ('student', ex['student'].options[1]), ('part', 'val')):
        ex[name].value = value
        assert ex.image.value not in seen and 'kdocr-error' not in said(ex), (name, said(ex))
        seen.add(ex.image.value)
    ex['tap'].value = 'backbone_out'
    assert 'entropy' not in ex['measure'].options and set(ex['measure'].options) == set(_ALIGNMENT_VIEWS) - {'entropy'}
    val = read_json(RunFolder(results/'teacher').scores)['val']['n']
    counts = []
    for w in list(ex['which'].options)[1:]:
        ex['which'].value = w
        counts.append(0 if 'no plate of this part' in said(ex) else ex['plate'].max)
    assert sum(counts) == val

def test_students_that_do_not_fit_are_named_and_the_rest_goes_on(results):
    bad = dict(unfinished='not finished', damaged='damaged', moved='split_hash', empty='not a run folder', nowhere='no such checkpoint')
    ex = explore_alignment(None, [results/n for n in ('control', 'charset', *bad)], drawn()) # the teacher is the one that the control names
    assert all(any(f'/{n}' in l and why in l for l in ex.said) for n, why in bad.items()), ex.said
    assert any('charset' in l and 'logits not compared' in l for l in ex.said) and len(ex['student'].options) == 2 and all(l.split(':')[0].split('/')[-1] in said(ex) for l in ex.said)
    ex['student'].value = ex['student'].options[1]
    assert [v for _, v in ex['tap'].options] == ['backbone_out', 'transformer_out']
    ex['part'].value = 'train'
    assert ex['which'].disabled and ex['which'].value == 'all'
    with pytest.raises(KdocrError, match='unfinished: this run is not finished'): explore_alignment(results/'teacher', results/'unfinished', drawn())
    with pytest.raises(KdocrError, match='no teacher was named'): explore_alignment(None, results/'charset')

def test_a_published_teacher_tells_its_run_and_a_bare_checkpoint_nothing(results, tmp_path):
    ex = explore_alignment(results/'teacher_best.pth', results/'control')                    # data and readings are known by the run folder beside it
    assert not ex['which'].disabled and not explore_alignment(None, results/'control')['which'].disabled
    before = ex.image.value
    ex['which'].value = 'both wrong'                                                         # all of them, after four steps: the picture says so
    assert ex.image.value != before and 'both wrong' in words(ex.figure())
    shutil.copy(results/'teacher_best.pth', tmp_path/'bare.pth')
    with pytest.raises(KdocrError, match='name the folder'): explore_alignment(tmp_path/'bare.pth', tmp_path/'bare.pth')
    assert explore_alignment(tmp_path/'bare.pth', tmp_path/'bare.pth', drawn())['which'].disabled

def test_a_teacher_of_other_data_is_not_taken_for_the_rest(results, tmp_path):
    "The first run comes from another experiment, whose data are gone and whose teacher is still there."
    shutil.copytree(results/'moved', tmp_path/'moved')
    write_json(tmp_path/'moved/env.json', dict(read_json(tmp_path/'moved/env.json'), data='/gone'))
    cfg = load_config(tmp_path/'moved/config.yaml', data='/gone/plates', teacher_checkpoint=str(tmp_path/'other_best.pth'))
    save_config(cfg, tmp_path/'moved/config.yaml')
    save_checkpoint(tmp_path/'other_best.pth', dict(load_checkpoint(results/'teacher_best.pth'), split_hash='0'*16))
    ex = explore_alignment(None, [tmp_path/'moved', results/'control'])
    assert list(ex['student'].options) == ['random init, control'] and any('moved' in l for l in ex.said)
    with pytest.raises(KdocrError, match='/gone'): explore_alignment(None, [tmp_path/'moved'])

def test_data_where_the_runs_have_them(results):
    opened, lines_ = _the_data(None, [explore.read_run(results/n) for n in ('control', 'moved')])
    assert str(opened.held.cfg.data) == drawn() and any('moved' in l and 'other data' in l for l in lines_)

def test_data_are_opened_once_for_each_size(results, monkeypatch):
    calls = []
    monkeypatch.setattr(HeldOut, 'open', lambda self, mode, about: calls.append((mode, about['height'])) or open_data(self.cfg.model_copy(update=about)))
    data = open_data(load_config(results/'control/config.yaml'))
    opened, _ = _the_data(data, [])
    about = dict(height=32, width=128)
    assert opened.at(about) is data and not calls and opened.at(dict(about, height=16)) is opened.at(dict(about, height=16)) and calls == [('student', 16)]

def test_another_width_is_shown_without_cosine(results):
    opened, _ = _the_data(drawn(), [])
    t = _Side(results/'teacher_best.pth', 'teacher', opened, 'teacher')
    taps = t.on('val')[1]
    narrow = SimpleNamespace(on=lambda part: (None, {k: x[..., :10] for k, x in taps.items() if k != 'backbone_out'}), about=t.about)
    assert _shared_taps(narrow, t) == (['transformer_out', 'logits'], 'no tap backbone_out in both')


# ---- many runs

def test_runs_that_do_not_fit_are_named_and_the_rest_goes_on(results):
    ex = explore_runs(results)
    assert [any(n in l and why in l for l in ex.said) for n, why in (('unfinished', 'not finished'), ('moved', 'other data'), ('charset', 'its charset is another'))] == [True]*3 and len(ex['runs'].options) == 4
    assert any('empty' in l and 'not a run folder' in l for l in explore_runs([results/'control', results/'empty']).said)
    with pytest.raises(KdocrError, match='unfinished: this run is not finished'): explore_runs([results/'unfinished'])
    with pytest.raises(KdocrError, match='not a run folder'): explore_runs(results/'nowhere')

def test_a_log_that_cannot_be_read_is_said_when_its_run_is_chosen(results, tmp_path):
    for n in ('control', 'distilled', 'other'): shutil.copytree(results/('distilled' if n == 'other' else n), tmp_path/n)
    with open(tmp_path/'control/metrics.jsonl', 'a') as f: f.write('{no json\n')
    write_json(tmp_path/'other/env.json', ['no', 'names'])
    ex = explore_runs(tmp_path)                                                              # it is among the two that are chosen at first
    assert ['no names and values' in ex.said[0], 'control/metrics.jsonl: a damaged line' in ex.said[1]] == [True]*2 and len(ex.said) == 2
    assert 'kdocr-error' not in said(ex) and ex.image.value
    ex['runs'].value = ('random init, control',)
    assert 'none of the runs that are chosen has a log' in said(ex)
    ex['runs'].value = tuple(ex['runs'].options)
    assert 'kdocr-error' not in said(ex) and len(ex.said) == 2                               # said once

def test_what_fails_while_controls_adapt_is_shown():
    def adapt(c, name):
        if name == 'n' and c['n'].value == 2: raise KdocrError('two: it cannot be')
    ex = explore._Explorer({'': {'n': explore.W.IntSlider(1, 0, 5)}}, lambda n: _figure(2, 1), adapt)
    ex['n'].value = 2
    assert 'two: it cannot be' in said(ex)
    ex['n'].value = 3
    assert 'two' not in said(ex)

def test_every_control_of_the_runs_changes_the_picture(results):
    ex = explore_runs([results/'control', results/'distilled', results/'teacher'])
    seen = {ex.image.value}
    assert list(ex['runs'].value) == list(ex['runs'].options)[:2]
    for name, value in (('runs', tuple(ex['runs'].options)), ('terms', ('ctc', 'logits')), ('what', 'share'), ('what', 'weighted'), ('scale', 'linear'), ('smoothing', 3), ('panels', 'term')):
        ex[name].value = value
        assert ex.image.value not in seen and 'kdocr-error' not in said(ex), name
        seen.add(ex.image.value)
    ex['runs'].value = ex['runs'].options[:1]
    assert ex['terms'].value == ('ctc',)
    ex['runs'].value = tuple(ex['runs'].options)
    assert set(ex['terms'].value) == {'ctc', 'logits'} # what was switched off stays off
    ex['terms'].value = ()
    assert 'choose a run and a term' in said(ex)

def test_the_curves_are_the_logs(results):
    logs = {n: read_curve(results/n).log for n in ('control', 'distilled')}
    arms, keys = [CurveArm(n, [l]) for n, l in logs.items()], ['ctc', 'backbone_out']
    fig = _runs_figure(arms, keys, 'raw', True, 1, 'run')
    a, b, acc = fig.axes
    assert [ax.get_title(loc='left') for ax in fig.axes] == ['control', 'distilled', 'accuracy'] and [len(lines(ax)) for ax in fig.axes] == [1, 2, 2]
    assert np.allclose(lines(b)[1].get_ydata(), series(logs['distilled'], 'backbone_out', 'raw')) and lines(b)[1].get_color() == TERM_STYLES['backbone_out'][1] and b.get_yscale() == 'log'
    assert np.allclose(lines(acc)[0].get_ydata(), 100*logs['control'].val_exact_match.dropna())
    fig = _runs_figure(arms, keys, 'weighted', False, 3, 'term')
    assert [ax.get_title(loc='left') for ax in fig.axes] == ['CTC', 'backbone', 'accuracy'] and [len(lines(ax)) for ax in fig.axes] == [2, 1, 2] and 'running median of 3 points' in words(fig)
    for what, by in (('grad', 'run'), ('cosine', 'run'), ('cosine', 'term')): assert 'not measured' in [t.get_text() for t in _runs_figure(arms, keys, what, True, 0, by).axes[0].texts]

def test_long_lines_are_thinned_after_smoothing():
    n = 5000
    log = pd.DataFrame(dict(step=range(n), ctc=np.arange(n) % 2 + 1., loss=1., val_exact_match=np.nan))
    ax = _runs_figure([CurveArm('a', [log])], ['ctc'], 'raw', False, 3, 'run').axes[0]
    assert [len(l.get_xdata()) for l in ax.lines] == [1000, 1000] and 'n = 5000' in ax.get_xlabel()
    assert np.allclose(lines(ax)[0].get_ydata()[1:], log.ctc.rolling(3, center=True).median()[5::5])

def test_more_panels_than_fit_are_named(results):
    log = read_curve(results/'control').log
    fig = _runs_figure([CurveArm(f'run {i}', [log]) for i in range(11)], ['ctc'], 'raw', True, 0, 'run')
    assert sum(bool(ax.lines) for ax in fig.axes) == 9 and 'not shown: run 8, run 9, run 10' in words(fig)

def test_the_most_frequent_charset_and_data_count(results):
    h = _read_head(results/'control')
    others = [h._replace(path=h.path/'c', cfg=h.cfg.model_copy(update=dict(charset='AB'))), h._replace(path=h.path/'d', data=('x', 'y'))]
    kept, lines_ = _alike([others[0], h, h, others[1]])
    assert kept == [h, h] and ['charset' in lines_[0], 'other data' in lines_[1]] == [True]*2 and _alike([]) == ([], [])
    assert _run_paths(results/'control') == [results/'control'] and results/'unfinished' in _run_paths([results]) and _run_paths(['x']) == ['x']

def test_a_term_has_one_line_in_every_panel():
    def log(*keys): return pd.DataFrame({'step': [1, 2], 'loss': 3., 'ctc': 1., 'val_exact_match': np.nan, **{f'kd_{k}{e}': 1. for k in keys for e in ('', '_weighted')}})
    arms = [CurveArm('a', [log('logits_kl')]), CurveArm('b', [log('logits', 'logits_kl')]), CurveArm('c', [log('backbone_out_cosine')])]
    drawn = {}
    for ax in _runs_figure(arms, ['logits', 'logits_kl', 'backbone_out_cosine'], 'raw', True, 1, 'run').axes[:3]:
        for l in lines(ax): drawn.setdefault(l.get_label(), set()).add((l.get_color(), l.get_linestyle()))
    assert set(drawn) == {'logits', 'logits, kl', 'backbone, cosine'} and all(len(v) == 1 for v in drawn.values()) # ctc was not chosen
    assert len({next(iter(v)) for v in drawn.values()}) == 3 and drawn['logits'] == {(TERM_STYLES['logits'][1], '-')}


# ---- a run that is watched

def trainer_of(out, name, results, **kw):
    cfg = small(out, name=name, mode='student', teacher_checkpoint=str(results/'teacher_best.pth'), steps=4, eval_every=2, log_every=1, **kw)
    data = open_data(cfg)
    return new_trainer(cfg, RunFolder(cfg.out/name), data, load_teacher(cfg, data.split.hash))

@pytest.mark.parametrize('more', [{}, dict(ema=.9)], ids=['plain', 'average'])
def test_a_watched_run_is_the_same_run(results, tmp_path, more):
    a, b = (trainer_of(tmp_path, n, results, **more) for n in 'ab')
    a.fit()
    view = _Live(b, tracks=3, share=float('inf'))
    pictures = [view.explorer.image.value]
    update = view.update
    view.update = lambda: update() or pictures.append(view.explorer.image.value)
    b.fit(view.watch)
    x, y = (load_checkpoint(t.run.last) for t in (a, b))
    assert all(torch.equal(x['model'][k], y['model'][k]) for k in x['model']) and view.drawings == 5 and len(set(pictures)) >= 4
    assert view.log.step.max() == 4 and len(view.readings) == 3 and [r[0] for r in view.readings] == view.batch.texts
    read = view.read()
    best = a.modules['average'].model if more else a.model
    mode = best.training
    want = explore.greedy_read(best.eval().forward_taps(view.batch.images).logits, a.charset)
    assert [(r[1], r[2]) for r in read] == [(w.text, w.confidence) for w in want] and best.train(mode) is best
    ax = _live_figure(view.log, read, view.pictures, 'b', 4, True, 0).axes
    assert np.allclose(lines(ax[0])[0].get_ydata(), view.log.ctc.dropna()) and len(ax[2].images) == 3 and ax[1].get_xlim() == (0, 4)
    before = view.explorer.image.value
    view.explorer['scale'].value = 'linear'
    assert view.explorer.image.value != before

def test_drawing_stays_under_its_share_of_the_time(results, tmp_path, monkeypatch):
    view, now = _Live(trainer_of(tmp_path, 'slow', results), tracks=1, share=.1), [100.]
    monkeypatch.setattr(explore, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    drawn_at, view.last = [], 5.
    def update():
        drawn_at.append(now[0] - 100); now[0] += 5
        view.spent += 5
    view.update = update
    def steps():
        for _ in range(200): now[0] += 1; yield now[0]
    seen = []
    for r in view.watch(steps()):
        seen.append(r)
        assert view.spent <= .1*(now[0] - 100)
    assert len(seen) == 200 and drawn_at == [50, 100, 150, 200, 220] # the last one when all is done

def test_live_is_fit_with_the_commands_folder(results, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(explore, 'display', lambda what, **kw: shown.append(what))
    run = train_kd(small(tmp_path, name='watched', steps=3, eval_every=3), fit=live)
    assert run.finished and run.config.is_file() and len(shown) == 1 and isinstance(shown[0], _Explorer) and 'step 3 of 3' in words(shown[0].figure())

def test_a_log_is_read_from_where_it_was_left(tmp_path):
    tail = _LogReader(tmp_path/'log')
    assert tail.read().empty
    (tmp_path/'log').write_text('{"step": 1}\n{"st')
    assert tail.read().step.tolist() == [1]
    with open(tmp_path/'log', 'a') as f: f.write('ep": 2}\n{"step": 3}\n')
    assert tail.read().step.tolist() == [1, 2, 3]


# ---- the notebook

@pytest.mark.slow
def test_the_notebook_shows_pictures_without_a_kernel(results, tmp_path):
    names = ('teacher', 'control', 'distilled', 'unfinished', 'damaged', 'empty')
    nb = nbformat.read(run_notebook('explore', tmp_path, dict(runs=[str(results/n) for n in names], out=str(tmp_path))), 4)
    shown = [[o['data'] for o in c.outputs if o.output_type == 'display_data'] for c in nb.cells if c.cell_type == 'code']
    pairs = [s for s in shown if len(s) == 2]
    assert len(pairs) == 3 and all('application/vnd.jupyter.widget-view+json' in a and base64.b64decode(b['image/png'])[1:4] == b'PNG' for a, b in pairs)
    png, pdf = ({p.stem for p in (tmp_path/'figures').glob(f'*.{k}')} for k in ('png', 'pdf'))
    assert png == pdf == {'explore_tracks', 'explore_alignment', 'explore_runs'}
    assert not [o for c in nb.cells for o in c.get('outputs', ()) if o.get('name') == 'stderr' and 'Warning' in o.text]
    state = json.dumps(nb.metadata)
    assert 'unfinished: this run is not finished' in state and 'empty: not a run folder' in state
