"""What is drawn of a network's inside: the values, how many artists, the labels; and notebooks that bear runs which do not fit."""
import json
import shutil
from pathlib import Path
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import nbformat
import editdistance
import numpy as np
import pandas as pd
import pytest
import torch
from kdocr.core import KdocrError, read_json, write_json
from kdocr.config import Config, load_config, save_config
from kdocr.charset import DEFAULT_CHARS, Charset
from kdocr.metrics import Prediction, wilson
from kdocr.jobs.notebooks import run_notebook
from kdocr.analysis.figures import PAGE, TERM_STYLES, plot_spikes, use_style
from kdocr.models.restran import make_model
from kdocr.training.run_folder import RunFolder, load_checkpoint, save_checkpoint
from kdocr.analysis.compare import Run, read_run
from kdocr.distill.similarity import cosine_by_position, error_by_position, pca_rgb
from kdocr.analysis.probe import (CHANGES, STRIP_STYLES, EXTRA_COLOURS, QUANTITIES, CurveArm, Curve, CheckpointProbe,
                                  Strip, align_probes, arms_of, as_steps, attention_strips, attention_weights,
                                  by_frames, calibration_error, changes, channel_frame, channel_strips, column,
                                  confusion, mark_differences, each, edits, find_teacher, frames_table, fusion_frame,
                                  held_out, save_plot, layer_names, legend_of, probe, loss_terms, mark_disagreement,
                                  missed, not_comparable, over_seeds, over_tracks, plate_image, plot_alike_accurate,
                                  plot_by_step, plot_changes, plot_channels, plot_confusion, plot_frames,
                                  plot_fusion, plot_groups, plot_heads, plot_layers, plot_plates, plot_reliability,
                                  plot_runs, plot_strips, plot_terms, read_curve, reliability, run_styles, series,
                                  smoothing, tap_strips, taught_by_others, unique_labels, widest_channels, wrapped)
from small_runs import small

ARMS = ['random init, control', 'random init, distilled', "teacher's weights, distilled"]
PLATE = np.zeros((32, 128, 3))

def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def said(ax): return [t.get_text() for t in ax.texts]
def lines(ax): return [l for l in ax.lines if not l.get_label().startswith('_')]
def hexed(c): return matplotlib.colors.to_hex(c).upper()

@pytest.fixture(autouse=True)
def closed():
    torch.set_num_threads(1)
    with matplotlib.rc_context():
        use_style()
        yield
    plt.close('all')

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return make_model('restran_tiny').eval()

@pytest.fixture(scope='module')
def seen(model): return probe(model, randn(5, 3, 3, 32, 128), chunk=2)


# ---- looking

def test_a_look_changes_nothing_and_is_the_models_own_output(model, seen):
    with torch.no_grad(): out = model.forward_taps(randn(5, 3, 3, 32, 128))
    assert torch.allclose(seen.logits, out.logits, atol=1e-4) and seen.taps.keys() == {*out.taps, 'logits'}
    for k, x in out.taps.items(): assert torch.allclose(seen.taps[k], x, atol=1e-4)
    assert not any(m._forward_hooks for m in model.modules())

def test_layers_heads_and_frames_are_seen(model, seen):
    assert list(seen.layers) == layer_names(model) == ['backbone.stem', 'backbone.stages.0', 'backbone.stages.1', 'backbone.stages.2', 'refiner', 'encoder.0', 'encoder.1', 'head']
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
    assert layer_names(net) == ['0', '2']

def test_maps_become_lines_over_height_and_frames():
    x = torch.arange(2*3*4*8.).view(2, 3, 4, 8) # two frames of one track
    assert torch.allclose(as_steps(x, 1, 8)[0, :, 1], x[:, 1].mean((0, 1)))
    assert as_steps(x, 1, 4).shape == (1, 4, 3) and torch.allclose(as_steps(x, 1, 4)[0, 0], as_steps(x, 1, 8)[0, :2].mean(0))

def test_what_cannot_be_compared_is_said(seen):
    about = dict(charset='AB')
    bare = seen._replace(taps={k: v for k, v in seen.taps.items() if k != 'transformer_out'})
    assert not_comparable(CheckpointProbe(bare, about), CheckpointProbe(seen, about)) == {'transformer_out': 'the student has no such tap'}
    assert not_comparable(CheckpointProbe(seen, about), CheckpointProbe(bare, about)) == {'transformer_out': 'the teacher has no such tap'}
    assert 'AC' in not_comparable(CheckpointProbe(seen, dict(charset='AC')), CheckpointProbe(seen, about))['logits']
    longer = seen._replace(taps={'logits': randn(5, 8, 37)})
    assert align_probes({'s': longer}, seen)['s']['logits'].shape == (5, 16, 37)


# ---- strips

def test_strips_of_a_tap_carry_its_cosine_and_error():
    s, t = randn(3, 16, 9), randn(3, 16, 9, seed=1)
    colours, cos, err = tap_strips(1, 'student', s, t, pca_rgb(t))
    assert torch.equal(cos.image, cosine_by_position(s, t)[1]) and torch.equal(err.image, error_by_position(s, t)[1])
    assert (cos.value, err.value) == (f'{cos.image.mean():.2f}', f'{err.image.mean():.2f}') and colours.image.shape == (16, 3) and colours.name == 'student'

def test_strips_share_the_plates_width_and_lie_below_each_other():
    column = [Strip('plate', PLATE), Strip('colours', np.zeros((16, 3)), 'colours'), Strip('cosine', np.linspace(0, 1, 16), 'cosine', '0.50'), Strip('map', np.eye(4, 16), 'attention')]
    fig = plot_strips([column, column], ['track_1', 'track_2'], 'what differs')
    first, second = fig.axes[:2]
    assert [l.get_text() for l in first.get_yticklabels()] == ['plate', 'colours', 'cosine', 'map'] and not any(l.get_text() for l in second.get_yticklabels())
    ends = [im.get_extent() for im in first.images]
    assert {e[:2] for e in map(tuple, ends)} == {(0, 128)} and all(a[2] < b[3] for a, b in zip(ends, ends[1:]))
    assert [ax.get_title(loc='left') for ax in (first, second)] == ['track_1', 'track_2'] and '0.50' in said(first) and fig._suptitle.get_text() == 'what differs'
    assert [ax.get_xlabel() for ax in fig.axes[2:]] == [STRIP_STYLES['cosine'][2], STRIP_STYLES['attention'][2]]
    assert np.allclose(first.images[2].get_array(), np.linspace(0, 1, 16)[None])

def test_channels_in_the_teachers_units():
    t = randn(8, 16, 4) * torch.tensor([1., 9, 2, 5])
    assert widest_channels(t, 2) == [1, 3] and len(widest_channels(t, 9)) == 4
    a, b = channel_strips(0, {'teacher': t, 'student': t + 9}, t, [1])
    assert (a.name, b.name, a.kind) == ('teacher, channel 1', 'student, channel 1', 'channel')
    assert torch.allclose(b.image - a.image, torch.full((16,), 9/t[..., 1].std().item()), atol=1e-4)

def test_attention_strips_end_at_one():
    s, = attention_strips(1, {'teacher': randn(2, 5, 4, 16)})
    assert s.image.shape == (4, 16) and s.image.max() == 1 and s.kind == 'attention'

def test_a_picture_is_in_range(): assert plate_image(torch.full((1, 2, 3, 4, 8), -1.), 0, 1).max() == 0 and plate_image(torch.ones(1, 1, 3, 4, 8), 0).min() == 1


# ---- frames and their figures

def test_by_step_draws_medians_and_bands_for_few():
    x = torch.arange(5.)[:, None] * torch.ones(4)
    q = over_tracks([x])
    assert q[['mid', 'lo', 'hi', 'n', 'seeds']].iloc[0].tolist() == [2, 1, 3, 5, 1] and q.step.tolist() == [0, 1, 2, 3]
    ax = plot_by_step({ARMS[0]: q, ARMS[1]: q}, 'cosine')
    assert len(ax.lines) == 2 and len(ax.collections) == 2 and 'n = 5 plates' in ax.get_xlabel() and 'quartiles' in ax.get_ylabel()
    ax = plot_by_step({str(i): q for i in range(5)}, 'cosine', ax=plt.subplots()[1])
    assert len(ax.lines) == 5 and not ax.collections and ax.get_ylabel() == 'cosine, median'

def test_seeds_by_step_are_their_mean_in_their_range():
    x = torch.arange(5.)[:, None] * torch.ones(4)
    f = over_tracks([x, x + 1, x + 5])
    assert f[['mid', 'lo', 'hi', 'n', 'seeds']].iloc[0].tolist() == [4, 2, 7, 5, 3] and over_tracks([x**2], 'mean')[['mid', 'lo', 'hi']].iloc[0].tolist() == [6, 6, 6]
    ax = plot_by_step({str(i): f for i in range(5)}, 'entropy', 'mean')
    assert len(ax.collections) == 5 and 'range of 3 seeds' in ax.get_xlabel() and ax.get_ylabel() == 'entropy, mean'
    lo, hi = ax.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (lo, hi) == (2, 7)

def test_groups_are_drawn_by_arm_where_their_points_are():
    one = pd.DataFrame([dict(arm=ARMS[0], group=g, n=n, exact_match=r, lo=r - .02, hi=r + .02, seeds=1) for g, n, r in (('A', 10, .6), ('B', 20, .7))])
    both = pd.concat([one, one.assign(arm=ARMS[1], exact_match=one.exact_match + .1, lo=one.exact_match + .05, hi=one.exact_match + .15, seeds=3)])
    ax = plot_groups(both, 'height')
    assert ax.get_ylim() == pytest.approx((100*.58 - 2.16, 100*.85 + 2.16)) and [t.get_text() for t in ax.get_xticklabels()] == ['A\nn=10', 'B\nn=20'] and '%' in ax.get_ylabel()
    band, = [c for c in ax.collections if hasattr(c, 'get_paths') and len(c.get_paths()[0].vertices) > 4]
    assert band.get_paths()[0].get_extents().get_points()[:, 1].tolist() == pytest.approx([65, 85])     # the seeds' range; the single seed has bars
    assert [list(c.lines[0].get_ydata()) for c in ax.containers] == [[60, 70], [70, 80]] and [c.lines[0].get_linestyle() for c in ax.containers] == ['--', '-']
    ax = plot_groups(both, 'layout', joined=False, ax=plt.subplots()[1])
    assert {c.lines[0].get_linestyle() for c in ax.containers} == {'None'} and all(c.has_yerr for c in ax.containers)   # no line where there is no order

def test_layers_heatmap():
    m = np.array([[.1, .9, np.nan], [.5, .6, .7]])
    im = plot_layers(m, ['backbone.stem', 'head'], ['backbone.stages.0', 'encoder.1', 'dead'], 'a, b')
    assert said(im.axes) == ['.10', '.90', '.50', '.60', '.70'] and np.array_equal(np.ma.getdata(im.get_array()), m, equal_nan=True)
    assert [t.get_text() for t in im.axes.get_xticklabels()] == ['stage 0', 'layer 1', 'dead'] and im.axes.get_ylabel() == 'teacher'

def test_channels_are_sorted_and_the_dead_counted():
    x = randn(4, 16, 6)
    x[..., 2] = 0
    f = channel_frame({'HR teacher': {'logits': x}, ARMS[0]: {'logits': x[..., :5]}})
    assert f.groupby('reader', sort=False).dead.sum().tolist() == [1, 1] and len(f) == 11
    ax = plot_channels(f)
    assert [l.get_label() for l in lines(ax)] == ['HR teacher: 1 of 6 dead', f'{ARMS[0]}: 1 of 5 dead'] and np.allclose(ax.lines[0].get_ydata(), np.sort(f.norm[:6])[::-1])

def test_heads_of_unequal_number(seen):
    w = seen.attention['encoder.0'].mean(0)
    fig = plot_heads({'HR teacher': w, ARMS[0]: w[:2]}, 'layer 0')
    drawn = [ax for ax in fig.axes if ax.images]
    assert len(drawn) == 6 and [ax.get_title(loc='left') for ax in drawn[:4]] == [f'head {i}' for i in range(4)] and np.allclose(drawn[4].images[0].get_array(), w[0])
    assert len({im.get_clim() for ax in drawn for im in ax.images}) == 1

def test_fusion(seen):
    f = fusion_frame(seen.fusion)
    assert f.frame.tolist() == [1, 2, 3] and f.share.sum() == pytest.approx(1, abs=1e-5) and (f.n == 5).all()
    fig = plot_fusion(seen.fusion[0], [PLATE] * 3, 'track_1')
    assert [l.get_text() for l in fig.axes[0].get_yticklabels()] == ['frame 1', 'weight', 'frame 2', 'weight', 'frame 3', 'weight']
    assert said(fig.axes[0])[1::2] == [f'{w.mean():.0%}' for w in seen.fusion[0]]

def test_the_raster_marks_what_differs():
    ids = {'HR teacher': np.array([[0, 1, 0, 2]]), 'student': np.array([[1, 1, 0, 0]])}
    axes = plot_spikes(ids, 'AB')
    mark_disagreement(axes, ids, {'student': dict(frames=.5, character_frames=None, student_blank=.5, teacher_blank=.25)})
    assert [hexed(t.get_color()) for t in axes[1].texts] == ['#B2182B', '#000000'] and 'spoken –' in axes[1].get_title(loc='left') and 'blank 25%' in axes[0].get_title(loc='left')

def test_alike_and_accurate():
    f = pd.DataFrame([dict(arm=a, control=i == 0, tap=t, cka=.1 + .2*i, exact=.2*i, lo=.2*i, hi=.2*i + .1, tracks=50) for i, a in enumerate(ARMS) for t in list(TERM_STYLES)[1:]])
    fig = plot_alike_accurate(f)
    assert len(fig.axes) == 3 and all('n = 3 runs' in ax.get_xlabel() and 'rank' not in ax.get_title(loc='left') for ax in fig.axes) and 'n = 50 tracks' in fig.axes[0].get_ylabel()
    points = [l for l in fig.axes[0].lines if l.get_marker() in 'osD']
    assert [(l.get_xdata()[0], l.get_ydata()[0]) for l in points] == [pytest.approx((.1 + .2*i, 20*i)) for i in range(3)]
    assert 'not imply' in fig._suptitle.get_text() and fig.axes[0].get_ylim() == pytest.approx((-2, 54)) # 0 to 50 %, with some room
    seeds = plot_alike_accurate(pd.concat([f, f.assign(exact=f.exact + .01)]))
    assert [t.get_text() for t in seeds.legends[0].get_texts()] == ARMS and 'n = 6 runs' in seeds.axes[0].get_xlabel() # a name an arm, a point a run
    many = pd.concat([f.assign(arm=f.arm + str(i)) for i in range(6)])
    assert len({(v['color'], v['marker'], v['linestyle']) for v in run_styles(many.arm).values()}) == 18 # more runs than markers

def test_looks_do_not_meet_terms():
    looks = run_styles([f'random init, distilled, seed {i}' for i in range(5)])
    assert len({v['color'] for v in looks.values()}) == 5 and not set(EXTRA_COLOURS) & {c for _, c in TERM_STYLES.values()}
    assert {v['color'] for v in run_styles(['HR teacher']).values()} == {'black'}

def test_saved_once_laid_out(tmp_path):
    fig = plt.figure()
    assert save_plot(fig, tmp_path, 'x').read_bytes()[1:4] == b'PNG' and (tmp_path/'x.pdf').read_bytes()[:4] == b'%PDF'


# ---- the loss

@pytest.fixture
def log():
    n = 60
    steps = pd.DataFrame(dict(step=range(1, n + 1), loss=10., ctc=4., lr=1e-3))
    for k, w in (('logits', 1.), ('backbone_out', 2.), ('logits_kl', 3.)): steps[f'kd_{k}'], steps[f'kd_{k}_weighted'] = 2*w, w
    probe = steps.step % 20 == 0
    return pd.concat([steps.assign(kd_logits_grad=np.where(probe, 5., np.nan), kd_logits_grad_cos=np.where(probe, -.5, np.nan), ctc_grad=np.where(probe, 2., np.nan)),
                      pd.DataFrame(dict(step=[30, 60], val_exact_match=[.1, .6]))], ignore_index=True)

def test_terms_keep_their_order_and_colours(log):
    found = loss_terms(log)
    assert [(t.key, t.kind, t.label) for t in found] == [('ctc', 'ctc', 'CTC'), ('backbone_out', 'mse', 'backbone'), ('logits', 'mse', 'logits'), ('logits_kl', 'kl', 'logits, kl')]
    assert [t.colour for t in found] == [TERM_STYLES[t.tap][1] for t in found] and found[2].line != found[3].line
    assert [t.key for t in loss_terms(log[['step', 'ctc']])] == ['ctc'] and loss_terms() == []
    assert loss_terms(pd.DataFrame(columns=['step', 'kd_other_weighted']))[0].label == 'other'

def test_a_term_called_cosine_is_no_gradients_cosine():
    f = pd.DataFrame(dict(step=[1], loss=[2.], ctc=[1.], kd_logits_cosine=[.5], kd_logits_cosine_weighted=[1.], kd_logits=[1.], kd_logits_weighted=[0.]))
    assert {t.key for t in loss_terms(f)} == {'ctc', 'logits', 'logits_cosine'} and series(f, 'logits', 'cosine') is None and series(f, 'logits_cosine', 'raw').tolist() == [.5]

def test_series_where_they_were_measured(log):
    assert series(log, 'logits', 'raw').tolist() == [2.] * 60 and series(log, 'backbone_out', 'weighted').iloc[0] == 2
    assert sum(series(log, k, 'share').iloc[0] for k in ('ctc', 'logits', 'backbone_out', 'logits_kl')) == pytest.approx(100)
    assert dict(series(log, 'logits', 'grad')) == {20: 5, 40: 5, 60: 5} and dict(series(log, 'ctc', 'grad')) == {20: 2, 40: 2, 60: 2}
    assert series(log, 'backbone_out', 'grad') is None and series(log, 'ctc', 'cosine') is None
    assert series(log.assign(kd_logits_share=.25), 'logits', 'share').iloc[0] == 25
    with pytest.raises(KdocrError, match="did you mean 'share'"): series(log, 'ctc', 'shar')

def test_seeds_become_a_mean_in_its_range():
    runs = [pd.Series([1., 2, 3], [1, 2, 3]), pd.Series([3., 4], [1, 2])]
    f = over_seeds(runs, 1)
    assert f.mid.tolist() == [2, 3, 3] and f.lo.tolist() == [1, 2, 3] and f.hi.tolist() == [3, 4, 3] and f.n.tolist() == [2, 2, 1]
    assert over_seeds([pd.Series([0., 9, 0], [1, 2, 3])], 3).mid.tolist() == [4.5, 0, 4.5] and (smoothing(500), smoothing(10), smoothing(500, 3)) == (10, 1, 3)

def test_arms_join_seeds(log):
    cfgs = [Config(mode='student', teacher_checkpoint='t', seed=s, distill_weight=w) for s, w in ((0, 1), (1, 1), (0, 0))]
    arms = arms_of([Curve(Path(f'r{i}'), c, log, True) for i, c in enumerate(cfgs)])
    assert [(a.label, len(a.logs)) for a in arms] == [('random init, distilled, 2 seeds', 2), ('random init, control', 1)]

@pytest.mark.parametrize('what, drawn', [('raw', 4), ('weighted', 4), ('share', 4), ('grad', 2), ('cosine', 1)])
def test_terms_are_drawn_where_measured(log, what, drawn):
    ax = plot_terms(CurveArm('a', [log]), what, logy=what in ('raw', 'grad'))
    own = lines(ax)
    assert len(own) == drawn and [hexed(l.get_color()) for l in own] == [t.colour for t in loss_terms(log) if series(log, t.key, what) is not None]
    assert ax.get_ylabel().startswith(QUANTITIES[what]) and ax.get_yscale() == ('log' if what in ('raw', 'grad') else 'linear') and f"n = {3 if what in ('grad', 'cosine') else 60}" in ax.get_xlabel()
    assert ax.get_legend().get_title().get_text() == 'every point'

def test_a_band_over_seeds_and_a_smoothing_with_a_name(log):
    ax = plot_terms(CurveArm('a', [log, log.assign(ctc=6.)]), 'raw', window=5)
    assert len(ax.collections) == 4 and lines(ax)[0].get_ydata()[10] == 5 and ax.get_legend().get_title().get_text() == 'running median of 5 points; band: range of 2 seeds'

def test_nothing_measured_draws_nothing_and_says_so(log):
    for what in ('grad', 'cosine'):
        ax = plot_terms(CurveArm('a', [log[['step', 'ctc']]]), what, ax=plt.subplots()[1])
        assert not lines(ax) and ax.get_legend() is None and said(ax) == ['not measured'] and 'n =' not in ax.get_xlabel()
    assert said(plot_runs([CurveArm('a', [log])], column('nothing'), 'nothing', ax=plt.subplots()[1])) == ['not measured']

def test_runs_overlaid(log):
    ax = plot_runs([CurveArm(ARMS[0], [log]), CurveArm(ARMS[1], [log]), CurveArm(ARMS[2], [log[['step', 'ctc']]])], column('val_exact_match', 100), 'exact match (%)')
    assert [l.get_label() for l in lines(ax)] == ARMS[:2] and [l.get_linestyle() for l in lines(ax)] == ['--', '-'] and list(lines(ax)[0].get_ydata()) == [10, 60]

def test_logs_that_are_none(tmp_path):
    (tmp_path/'empty').mkdir()
    save_config(Config(), tmp_path/'empty/config.yaml')
    (tmp_path/'bad').mkdir()
    save_config(Config(), tmp_path/'bad/config.yaml')
    (tmp_path/'bad/metrics.jsonl').write_text('no json\n')
    got, lines = each([tmp_path/'nowhere', tmp_path/'empty', tmp_path/'bad'], read_curve)
    assert not got and ['not a run folder' in lines[0], 'no steps yet' in lines[1], 'metrics.jsonl: a damaged line' in lines[2]] == [True] * 3 and all(n in l for n, l in zip(('nowhere', 'empty', 'bad'), lines))


# ---- errors

@pytest.mark.parametrize('text, pred', [('ABC1D23', 'ABC1D23'), ('ABC1D23', 'A8C1023'), ('ABC', ''), ('', 'AB'), ('AAB', 'AB'), ('ABCD', 'BCDA'), ('Q0O0', '0O0Q')])
def test_edits_are_the_fewest(text, pred):
    pairs = edits(text, pred)
    assert ''.join(a for a, _ in pairs) == text and ''.join(b for _, b in pairs) == pred and sum(a != b for a, b in pairs) == editdistance.eval(text, pred)

def test_confusions_count_every_character_once():
    preds = [Prediction('a', 'AB', 'A8', 1), Prediction('b', 'BB', '8', 1), Prediction('c', 'A', 'AA', 1)]
    t = confusion(preds)
    assert t.iloc[:-1].values.sum() == 5 and t.loc['B', '8'] == 2 and t.loc['B', ''] == 1 and t.loc['', 'A'] == 1 and t.loc['', ''] == 0
    im = plot_confusion(t, 'two runs', least=1)
    assert sorted(said(im.axes)) == ['1', '1', '2'] and 'counts from 1 are written' in im.axes.get_title(loc='left') and not said(plot_confusion(t, ax=plt.subplots()[1]).axes)[1:] and '2 taken for another, 1 missing, 1 added' in im.axes.get_title(loc='left') and 'n = 5 characters' in im.axes.get_title(loc='left')
    assert np.ma.getmaskarray(im.get_array()).diagonal().all() and im.axes.get_xticklabels()[-1].get_text() == 'missing'
    assert plot_confusion(confusion([]), ax=plt.subplots()[1]).axes.get_title(loc='left').startswith('n = 0')

def test_wrong_parts_stand_in_brackets():
    assert [mark_differences('ABC', p) for p in ('ABC', 'A8C', 'AC', 'ABXC', '')] == ['ABC', 'A[8]C', 'A[]C', 'AB[X]C', '[]']

def test_calibration_by_hand():
    preds = [Prediction(str(i), 'A', 'A' if i < 3 else 'B', .75) for i in range(4)] + [Prediction('x', 'A', 'B', 1.)] * 4
    t = reliability(preds, 4)
    assert t.n.tolist() == [8] and t.accuracy.tolist() == [3/8] and calibration_error(t) == pytest.approx(.875 - 3/8)
    t = reliability(preds, 10)
    assert t.n.tolist() == [4, 4] and calibration_error(t) == pytest.approx(.5) and tuple(t.iloc[0][['lo', 'hi']]) == pytest.approx(wilson(3, 4))
    ax = plot_reliability(t, 'a run')
    assert said(ax) == ['4', '4'] and 'expected calibration error 0.50' in ax.get_title(loc='left') and 'n = 8' in ax.get_xlabel()
    assert calibration_error(reliability([])) is None and 'no readings' in plot_reliability(reliability([]), ax=plt.subplots()[1]).get_title(loc='left')

def test_missed_and_changed():
    a = [Prediction('x', 'AB', 'AB', .9), Prediction('y', 'AB', 'A', .5), Prediction('z', 'CD', 'CD', .9)]
    b = [Prediction('z', 'CD', 'C', .95), Prediction('x', 'AB', 'A8', .8), Prediction('y', 'AB', 'AB', .9)]
    assert missed(a, b).key.tolist() == ['z', 'x'] and missed(b, b).empty and list(missed(b, b)) == ['key', 'text', 'pred', 'confidence']
    f = changes(a, b).set_index('key')
    assert f.change.to_dict() == dict(x='broken', y='fixed', z='broken') and f.before['y'] == 'A'
    ax = plot_changes(f, 'control', 'distilled')
    assert [p.get_width() for p in ax.patches] == [1, 2, 0, 0] and [t.get_text() for t in ax.get_yticklabels()] == list(CHANGES) and 'control' in ax.get_title(loc='left') and 'n = 3' in ax.get_xlabel()
    with pytest.raises(KdocrError, match='different tracks'): changes(a, b[1:])

def test_a_grid_of_plates():
    fig = plot_plates([[PLATE, PLATE]] * 5, [f'plate {i}' for i in range(5)], 'which', columns=4)
    assert len(fig.axes) == 8 and [len(ax.images) for ax in fig.axes] == [2] * 5 + [0] * 3 and fig.axes[4].get_title(loc='left') == 'plate 4'

def test_frames_have_intervals():
    right, wrong = Prediction('a', 'A', 'A', 1), Prediction('b', 'A', 'B', 1)
    t = frames_table({ARMS[0]: {1: [right, wrong], 2: [right, right]}, ARMS[1]: {1: [wrong, wrong], 2: []}})
    assert t.exact_match.tolist() == [.5, 1, 0] and tuple(t.iloc[0][['lo', 'hi']]) == pytest.approx(wilson(1, 2))
    ax = plot_frames(t)
    assert [list(c.lines[0].get_ydata()) for c in ax.containers] == [[50, 100], [0]] and 'n = 2 tracks' in ax.get_xlabel()


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
    data, kept, lines = held_out(runs)
    assert [r.path.name for r in kept] == ['control', 'teacher'] and len(lines) >= 1 and all('moved' in l for l in lines) and data.fingerprint == read_json(RunFolder(results/'control').env)['data_fingerprint']
    assert find_teacher(None, kept) == RunFolder(results/'teacher').best and find_teacher(None, kept[:1]).name == 'teacher_best.pth' and find_teacher(results/'x.pth', kept) == results/'x.pth'

def test_data_found_beside_a_moved_run(results, tmp_path):
    shutil.copytree(results/'control', tmp_path/'away')
    r = read_run(tmp_path/'away')
    env = read_json(RunFolder(r.path).env)
    write_json(RunFolder(r.path).env, dict(env, data='/gone/embedded'))
    away = Run(r.path, r.cfg.model_copy(update=dict(data=Path('/gone')/'embedded')), r.parts)
    data, kept, lines = held_out([away])
    assert data is None and kept == [] and 'away: its data are gone, there is no folder /gone/embedded nor' in lines[0]
    (tmp_path/'embedded').symlink_to(r.cfg.data)
    data, kept, lines = held_out([away])
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
    data, kept, lines = held_out([run])
    assert kept == [run] and not lines and data.cfg.data == tmp_path/'p/results/plates' and not (tmp_path/'plates/.kdocr').exists()

def test_another_teacher_is_said(results):
    runs = [read_run(results/n) for n in ('control', 'distilled_0')]
    best = RunFolder(results/'teacher').best
    assert taught_by_others(runs, best) == []
    line, = taught_by_others([runs[0], runs[1]._replace(facts=dict(runs[1].facts, teacher_hash='abcd'))], best)
    assert 'distilled_0: it was taught by another teacher' in line

@pytest.mark.parametrize('together', [False, True])
def test_frames_are_read_as_evaluate_reads_them(results, together):
    from kdocr.analysis.probe import load_reader
    from kdocr.training.evaluation import evaluate
    data, _, _ = held_out([read_run(results/'control')])
    model, about = load_reader(RunFolder(results/('frames' if together else 'control')).best, data.split)
    part = data.open('student', dict(about, frames=2)).test
    got = by_frames(model, part, Charset(about['charset']), together, most=2)
    for k in (1, 2):
        want = evaluate(model, data.open('student', dict(about, frames=k)).test if together else part, Charset(about['charset']), torch.device('cpu'), frames=None if together else k)
        assert [(p.key, p.pred) for p in got[k]] == [(p.key, p.pred) for p in want] and [p.confidence for p in got[k]] == pytest.approx([p.confidence for p in want], abs=1e-5)

def test_labels_of_twins():
    assert unique_labels([Config(), Config(), Config(seed=1)], ['a/x', 'b/y', 'c/z']) == ['HR teacher, seed 0 (x)', 'HR teacher, seed 0 (y)', 'HR teacher, seed 1']

def test_labels_stay_short_and_are_explained():
    cfgs = [Config(charset=DEFAULT_CHARS), Config(charset=DEFAULT_CHARS + '#'), Config(charset='AB')]
    short = unique_labels(cfgs, [Path('r/a'), Path('r/b'), Path('r/c')])
    assert short == ['HR teacher, a', 'HR teacher, b', 'HR teacher, charset AB'] and len(legend_of(short, cfgs)) == 2 and DEFAULT_CHARS in legend_of(short, cfgs)[0]
    assert max(map(len, wrapped('a label of many words that is long', 10).split(chr(10)))) <= 10
