"""Readings by frames, characters and confidence, and what changed between two readers."""
import matplotlib.pyplot as plt
import editdistance
import numpy as np
import pandas as pd
import pytest
from kdocr.core import KdocrError
from kdocr.metrics import Prediction, wilson
from kdocr.analysis.errors import (_CHANGES, _edits, calibration_error, changes, confusion, frames_table,
                                   mark_differences, missed, plot_changes, plot_confusion, plot_groups, plot_plates,
                                   plot_reliability, reliability)
from drawing import ARMS, closed, lines, PLATE, said


# ---- errors

@pytest.mark.parametrize('text, pred', [('ABC1D23', 'ABC1D23'), ('ABC1D23', 'A8C1023'), ('ABC', ''), ('', 'AB'), ('AAB', 'AB'), ('ABCD', 'BCDA'), ('Q0O0', '0O0Q')])
def test_edits_are_the_fewest(text, pred):
    pairs = _edits(text, pred)
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
    assert [p.get_width() for p in ax.patches] == [1, 2, 0, 0] and [t.get_text() for t in ax.get_yticklabels()] == list(_CHANGES) and 'control' in ax.get_title(loc='left') and 'n = 3' in ax.get_xlabel()
    with pytest.raises(KdocrError, match='different tracks'): changes(a, b[1:])

def test_a_grid_of_plates():
    fig = plot_plates([[PLATE, PLATE]] * 5, [f'plate {i}' for i in range(5)], 'which', columns=4)
    assert len(fig.axes) == 8 and [len(ax.images) for ax in fig.axes] == [2] * 5 + [0] * 3 and fig.axes[4].get_title(loc='left') == 'plate 4'

def test_frames_have_intervals():
    right, wrong = Prediction('a', 'A', 'A', 1), Prediction('b', 'A', 'B', 1)
    t = frames_table({ARMS[0]: {1: [right, wrong], 2: [right, right]}, ARMS[1]: {1: [wrong, wrong], 2: []}})
    assert t.exact_match.tolist() == [.5, 1, 0] and tuple(t.iloc[0][['lo', 'hi']]) == pytest.approx(wilson(1, 2))
    ax = plot_groups(t, 'frames of each track')
    assert [list(c.lines[0].get_ydata()) for c in ax.containers] == [[50, 100], [0]] and 'n = 2 tracks' in ax.get_xlabel()


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
