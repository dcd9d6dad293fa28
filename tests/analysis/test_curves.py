"""Labels, styles and curves of runs over the steps."""
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from kdocr.core import KdocrError
from kdocr.config import Config, save_config
from kdocr.charset import DEFAULT_CHARS
from kdocr.analysis.figures import TERM_STYLES, loss_terms, wrapped
from kdocr.analysis.probe import each
from kdocr.analysis.curves import (_Curve, CurveArm, QUANTITIES, _EXTRA_COLOURS, _over_seeds, _smoothing, arms_of,
                                   column, legend_of, plot_runs, plot_terms, read_curve, run_styles, series,
                                   unique_labels)
from drawing import ARMS, closed, hexed, lines, said


def test_styles_do_not_meet_terms():
    styles = run_styles([f'random init, distilled, seed {i}' for i in range(5)])
    assert len({v['color'] for v in styles.values()}) == 5 and not set(_EXTRA_COLOURS) & {c for _, c in TERM_STYLES.values()}
    assert {v['color'] for v in run_styles(['HR teacher']).values()} == {'black'}

def test_more_runs_than_markers_differ():
    many = run_styles([f'{a}{i}' for i in range(6) for a in ARMS])
    assert len({(v['color'], v['marker'], v['linestyle']) for v in many.values()}) == 18

def test_labels_of_twins():
    assert unique_labels([Config(), Config(), Config(seed=1)], ['a/x', 'b/y', 'c/z']) == ['HR teacher, seed 0 (x)', 'HR teacher, seed 0 (y)', 'HR teacher, seed 1']

def test_labels_stay_short_and_are_explained():
    cfgs = [Config(charset=DEFAULT_CHARS), Config(charset=DEFAULT_CHARS + '#'), Config(charset='AB')]
    short = unique_labels(cfgs, [Path('r/a'), Path('r/b'), Path('r/c')])
    assert short == ['HR teacher, a', 'HR teacher, b', 'HR teacher, charset AB'] and len(legend_of(short, cfgs)) == 2 and DEFAULT_CHARS in legend_of(short, cfgs)[0]
    assert max(map(len, wrapped('a label of many words that is long', 10).split(chr(10)))) <= 10
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
    f = _over_seeds(runs, 1)
    assert f.mid.tolist() == [2, 3, 3] and f.lo.tolist() == [1, 2, 3] and f.hi.tolist() == [3, 4, 3] and f.n.tolist() == [2, 2, 1]
    assert _over_seeds([pd.Series([0., 9, 0], [1, 2, 3])], 3).mid.tolist() == [4.5, 0, 4.5] and (_smoothing(500), _smoothing(10), _smoothing(500, 3)) == (10, 1, 3)

def test_arms_join_seeds(log):
    cfgs = [Config(mode='student', teacher_checkpoint='t', seed=s, distill_weight=w) for s, w in ((0, 1), (1, 1), (0, 0))]
    arms = arms_of([_Curve(Path(f'r{i}'), c, log, True) for i, c in enumerate(cfgs)])
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
