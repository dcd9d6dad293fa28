"""Figures by structure: lines, labels, colours and data, not pixels."""
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from kdocr.metrics import Prediction, wilson
from kdocr.analysis.figures import (PAGE, TERM_STYLES, arm_styles, cut, grid, legend_above, loss_terms,
                                    percent_range, plain_log, plot_arms, plot_forest, plot_losses, plot_over_steps,
                                    plot_readings, plot_spikes, plot_taps, save_figure, wrapped)

ARMS = ['random init, control', 'random init, distilled', "teacher's weights, control"]

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

@pytest.fixture
def log():
    n = 100
    steps = pd.DataFrame(dict(step=range(1, n + 1), lr=1e-3, ctc=np.linspace(6, 1, n), kd_backbone_out=2., kd_transformer_out=1., kd_logits=3.,
                              kd_backbone_out_weighted=1., kd_transformer_out_weighted=.5, kd_logits_weighted=1.5))
    return pd.concat([steps, pd.DataFrame(dict(step=[50, 100], val_exact_match=[.1, .6]))], ignore_index=True)

@pytest.mark.parametrize('weighted', [False, True])
def test_losses_draw_every_term_in_its_colour(log, weighted):
    ax = plot_losses(log, weighted=weighted)
    drawn = {l.get_label(): l.get_color() for l in ax.lines if not l.get_label().startswith('_')}
    assert drawn == {name: colour for name, colour in TERM_STYLES.values()}
    assert [len(l.get_ydata()) for l in ax.lines] == [100] * 8
    assert f"{'weighted' if weighted else 'raw'}" in ax.get_ylabel() and 'n = 100' in ax.get_xlabel() and ax.get_yscale() == 'log'
    assert ax.lines[3].get_ydata()[0] == (1. if weighted else 2.)

def test_a_control_has_one_term(log):
    assert [t.key for t in loss_terms(log[['step', 'ctc']])] == ['ctc']
    assert len(plot_losses(log[['step', 'ctc']]).lines) == 2

def test_terms_other_than_the_squared_error_are_drawn_too(log):
    other = log.rename(columns={'kd_logits': 'kd_logits_kl', 'kd_logits_weighted': 'kd_logits_kl_weighted'})
    ax = plot_losses(other)
    drawn = {l.get_label(): (l.get_color(), l.get_linestyle()) for l in ax.lines if not l.get_label().startswith('_')}
    assert list(drawn) == ['CTC', 'backbone', 'transformer', 'logits, kl'] and drawn['logits, kl'] == (TERM_STYLES['logits'][1], '--')
    assert loss_terms(log, other)[-1].line == '--' and [t.label for t in loss_terms(log, other)][-2:] == ['logits', 'logits, kl']

def test_panels_fill_rows_within_a_page():
    for n, most, rows in ((1, 4, [0]), (4, 4, [0] * 4), (5, 4, [0, 0, 0, 1, 1]), (9, 4, [0, 0, 0, 1, 1, 1, 2, 2, 2])):
        fig, axs = grid(n, most, 3, 2)
        assert [ax.get_subplotspec().rowspan.start for ax in axs] == rows and fig.get_figwidth() <= PAGE and fig.get_figheight() == 2 * (rows[-1] + 1)
        assert all(ax.axison == (ax in axs) for ax in fig.axes)

def test_an_axis_of_percent_begins_where_the_points_do():
    ax = plt.subplots()[1]
    percent_range(ax, .55, .80); assert ax.get_ylim() == pytest.approx((53, 82))
    percent_range(ax, 0, 1); assert ax.get_ylim() == (-2, 102)
    percent_range(ax, .5, .5); assert ax.get_ylim() == (48, 52)

def test_a_logarithmic_axis_has_plain_numbers():
    fig, ax = plt.subplots()
    ax.set(yscale='log', ylim=(.02, 30))
    plain_log(ax)
    fig.draw_without_rendering()
    said = [t.get_text() for t in ax.get_yticklabels(which='both')]
    assert {'0.1', '1', '10'} <= set(said) and not any('$' in t for t in said)
    for lo, hi, least in ((2., 9., {'2', '5'}), (15, 29, {'20'}), (.51, .6, {'0.55'})): # never fewer than two numbers on it
        ax.set_ylim(lo, hi)
        plain_log(ax)
        fig.draw_without_rendering()
        inside = [t.get_text() for t in ax.get_yticklabels(which='both') if t.get_text() and lo <= t.get_position()[1] <= hi]
        assert least <= set(inside) and len(inside) > 1 and not any('$' in t for t in inside), inside

def test_one_legend_over_all_panels():
    fig, axs = grid(2, 2, 3, 2)
    axs[0].plot([1, 2], label='a'); axs[1].plot([1, 2], label='a'); axs[1].plot([2, 1], label='b')
    legend_above(fig, axs, ['b', 'c', 'a'])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['b', 'a']

def test_names_break_after_underscores():
    assert wrapped('random_control, 3 seeds', 12) == 'random_\ncontrol, 3\nseeds' and wrapped('a b', 9) == 'a b'

def test_validation_rows_only(log):
    ax = plot_over_steps({ARMS[0]: log, ARMS[1]: log}, 'val_exact_match', 'exact match (%)', 100)
    assert [list(l.get_ydata()) for l in ax.lines] == [[10., 60.]] * 2
    assert [l.get_linestyle() for l in ax.lines] == ['--', '-'] and ax.get_ylabel().endswith('(%)')

def test_a_start_has_a_colour_and_a_control_a_dash():
    s = arm_styles(ARMS)
    assert s[ARMS[0]]['color'] == s[ARMS[1]]['color'] != s[ARMS[2]]['color']
    assert not {c['color'] for c in s.values()} & {c for _, c in TERM_STYLES.values()}

def test_an_arm_is_no_control_because_its_name_holds_the_word():
    s = arm_styles(['no_control_term', 'random init, control', 'random init, control, seed 1', 'my control'])
    assert [k['linestyle'] for k in s.values()] == ['-', '--', '--', '-']

def test_taps_hatch_controls_alone():
    frame = pd.DataFrame([dict(arm=a, tap='logits', cka=.5) for a in ('no_control_term', 'random init, control')])
    assert [bool(p.get_hatch()) for p in plot_taps(frame, 'cka', 'CKA').patches] == [False, True]

def test_arms_stand_in_order_with_intervals():
    ax = plot_arms(pd.DataFrame(dict(arm=ARMS, tracks=500, exact_match=[.5, .6, .7], lo=[.45, .55, .65], hi=[.55, .65, .75])))
    assert [t.get_text() for t in ax.get_yticklabels()] == ARMS and 'n = 500' in ax.get_xlabel() and '%' in ax.get_xlabel()
    assert [list(l.get_xdata()) for l in ax.lines[::2]] == [pytest.approx([45, 55]), pytest.approx([55, 65]), pytest.approx([65, 75])]

def test_seeds_stand_under_their_arm():
    table = pd.DataFrame(dict(arm=ARMS, tracks=500, exact_match=[.5, .6, .7], lo=[.45, .55, .65], hi=[.55, .65, .75], each=[[.48, .52], [.6], [.69, .7, .71]]))
    assert [sorted(c.get_offsets()[:, 0]) for c in plot_arms(table).collections] == [pytest.approx([48, 52]), pytest.approx([69, 70, 71])]

@pytest.fixture
def gains():
    row = lambda arm, each, t, judged: dict(arm=arm, control='ctc', seeds=[*range(len(each))], tracks=300, control_exact_match=.5, each=each, mean=np.mean(each), lo=np.mean(each) - .01, hi=np.mean(each) + .01,
                                            t_lo=np.mean(each) - t, t_hi=np.mean(each) + t, judged=judged)
    return pd.DataFrame([row('soft', [.02, .03, .04], .015, 'better'), row('twice', [.01, .02], .5, 'not enough seeds to say'), row('once', [-.02], np.nan, 'not enough seeds to say')])

def test_forest_holds_both_intervals_each_seed_and_the_control(gains):
    ax = plot_forest(gains)
    thick, thin = ([list(l.get_xdata()) for l in ax.lines if l.get_linewidth() == w and len(l.get_xdata())] for w in (7, 1.2))
    assert thick == [pytest.approx([2, 4]), pytest.approx([.5, 2.5]), pytest.approx([-3, -1])] and thin[0] == pytest.approx([1.5, 4.5])
    assert thin[1] == pytest.approx(ax.get_xlim()) and len(thin) == 2                            # two seeds: t leaves the picture, arrows say so; one seed: no t
    assert [l.get_marker() for l in ax.lines if l.get_marker() in '<>'] == ['<', '>']
    assert [l.get_markerfacecolor() == 'white' for l in ax.lines if l.get_markersize() == 7] == [False, True, True]
    assert sorted(ax.collections[0].get_offsets()[:, 0]) == pytest.approx([2, 3, 4])
    said = [t.get_text() for t in ax.texts]
    assert {'+3.0', '3 x 300', 'ctc, 50.0 %', '1 x 300', '-2.0'} <= set(said) and any(l.get_xdata()[0] == 0 and l.get_xdata()[1] == 0 for l in ax.lines if len(l.get_xdata()) == 2)
    assert {t.get_ha() for t in ax.get_yticklabels()} == {'left'} and [t.get_text() for t in ax.get_yticklabels()] == ['soft', 'twice', 'once']

def test_forest_of_one_arm_of_one_seed(gains): assert len(plot_forest(gains[2:]).get_yticks()) == 1

def test_cut_counts_every_track_once():
    preds = [Prediction(f't{i}', 'ABC1234', 'ABC1234' if i % 2 else 'ABC123', .5, 'Brazilian', 'A', 10 + i % 10) for i in range(60)]
    frame = cut({ARMS[0]: [preds]}, 'height')
    assert frame.n.sum() == 60 and (frame.n * frame.exact_match).sum() == 30
    by = cut({ARMS[0]: [preds]}, 'position')
    assert list(by.exact_match) == [1.] * 6 + [.5] and (by.hi <= 1).all()

def test_seeds_of_an_arm_are_a_mean_and_a_range():
    def read(right): return [Prediction(f't{i}', 'ABC1234', 'ABC1234' if i < right else 'A', .5, 'Brazilian', 'A', 12) for i in range(50)]
    frame = cut({ARMS[0]: [read(10), read(30), read(20)], ARMS[1]: [read(25)]}, 'layout')
    assert list(frame.exact_match) == pytest.approx([.4, .5]) and list(frame.n) == [50, 50]                  # plates are counted once, not once a seed
    assert (frame.lo[0], frame.hi[0]) == (.2, .6) and frame.lo[1] == pytest.approx(wilson(25, 50)[0])

def test_taps_bars():
    frame = pd.DataFrame([(a, t, .1 * i + .2 * j, .5) for i, a in enumerate(ARMS) for j, t in enumerate(list(TERM_STYLES)[1:])], columns=['arm', 'tap', 'cka', 'exact_match'])
    ax = plot_taps(frame, 'cka', 'CKA')
    assert len(ax.patches) == 9 and [p.get_hatch() for p in ax.patches[:3]] == ['////', None, '////']
    assert matplotlib.colors.to_hex(ax.patches[0].get_facecolor()).upper() == TERM_STYLES['backbone_out'][1]
    ax = plot_taps(pd.concat([frame, frame.assign(cka=frame.cka + .2)]), 'cka', 'CKA', ax=plt.subplots()[1])          # two seeds: mean and range
    assert len(ax.patches) == 9 and ax.patches[0].get_height() == pytest.approx(.1) and ax.collections[0].get_segments()[0][:, 1].tolist() == pytest.approx([0, .2])
    gaps = plot_taps(frame[(frame.arm != ARMS[0]) | (frame.tap != 'logits')], 'cka', 'CKA', ax=plt.subplots()[1])     # a tap that one arm lacks
    assert np.isnan(gaps.patches[6].get_height()) and gaps.patches[7].get_height() == pytest.approx(.5)

def test_spikes_and_readings():
    ids = np.array([[0, 1, 0, 2]])
    ax = plot_spikes({'HR teacher': ids}, 'AB')[0]
    assert [(t.get_text(), t.get_position()) for t in ax.texts] == [('A', (1, 0)), ('B', (3, 0))]
    fig = plot_readings(np.zeros((2, 32, 128, 3)), [Prediction('a', 'AB', 'AB', .9), Prediction('b', 'AB', '', .1)])
    assert [a.get_title() for a in fig.axes[:2]] == ['AB  0.90', '(nothing), is AB']

def test_saved_twice(tmp_path):
    assert save_figure(plt.figure(), tmp_path/'figures', 'x').read_bytes()[1:4] == b'PNG'
    assert (tmp_path/'figures/x.pdf').read_bytes()[:4] == b'%PDF'
