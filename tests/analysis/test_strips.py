"""What is drawn of a network: the values, how many artists, the labels."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from kdocr.analysis.figures import TERM_STYLES, plot_spikes
from kdocr.distill.similarity import cosine_by_position, error_by_position, pca_rgb
from kdocr.analysis.probe import probe
from kdocr.analysis.strips import (STRIP_STYLES, Strip, attention_strips, channel_frame, channel_strips,
                                   mark_disagreement, over_tracks, plate_image, plot_alike_accurate, plot_by_step,
                                   plot_channels, plot_fusion, plot_heads, plot_layers, plot_strips, save_plot,
                                   tap_strips)
from kdocr.analysis.curves import column
from drawing import ARMS, closed, hexed, lines, model, PLATE, randn, said, seen


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
    assert [s.name for s in channel_strips(0, {'t': t}, t, 2)] == ['t, channel 1', 't, channel 3'] and len(channel_strips(0, {'t': t}, t, 9)) == 4
    a, b = channel_strips(0, {'teacher': t, 'student': t + 9}, t, 1)
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
    fig = plot_fusion(seen.fusion[0], [PLATE] * 3, 'track_1')
    assert [l.get_text() for l in fig.axes[0].get_yticklabels()] == ['frame 1', 'weight', 'frame 2', 'weight', 'frame 3', 'weight']
    assert said(fig.axes[0])[1::2] == [f'{w.mean():.0%}' for w in seen.fusion[0]]

def test_the_raster_marks_what_differs():
    ids = {'HR teacher': np.array([[0, 1, 0, 2]]), 'student': np.array([[1, 1, 0, 0]])}
    axes = plot_spikes(ids, 'AB')
    mark_disagreement(axes, ids, {'student': dict(frames=.5, character_frames=None, student_blank=.5, teacher_blank=.25)})
    assert [hexed(t.get_color()) for t in axes[1].texts] == ['#B2182B', '#000000'] and 'characters –' in axes[1].get_title(loc='left') and 'blank 25%' in axes[0].get_title(loc='left')

def test_alike_and_accurate():
    f = pd.DataFrame([dict(arm=a, control=i == 0, tap=t, cka=.1 + .2*i, exact_match=.2*i, lo=.2*i, hi=.2*i + .1, tracks=50) for i, a in enumerate(ARMS) for t in list(TERM_STYLES)[1:]])
    fig = plot_alike_accurate(f)
    assert len(fig.axes) == 3 and all('n = 3 runs' in ax.get_xlabel() and 'rank' not in ax.get_title(loc='left') for ax in fig.axes) and 'n = 50 tracks' in fig.axes[0].get_ylabel()
    points = [l for l in fig.axes[0].lines if l.get_marker() in 'osD']
    assert [(l.get_xdata()[0], l.get_ydata()[0]) for l in points] == [pytest.approx((.1 + .2*i, 20*i)) for i in range(3)]
    assert 'not imply' in fig._suptitle.get_text() and fig.axes[0].get_ylim() == pytest.approx((-2, 54)) # 0 to 50 %, with some room
    seeds = plot_alike_accurate(pd.concat([f, f.assign(exact_match=f.exact_match + .01)]))
    assert [t.get_text() for t in seeds.legends[0].get_texts()] == ARMS and 'n = 6 runs' in seeds.axes[0].get_xlabel() # a name an arm, a point a run

def test_saved_once_laid_out(tmp_path):
    fig = plt.figure()
    assert save_plot(fig, tmp_path, 'x').read_bytes()[1:4] == b'PNG' and (tmp_path/'x.pdf').read_bytes()[:4] == b'%PDF'
