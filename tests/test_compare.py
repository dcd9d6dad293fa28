"""Statistics with known answers, and the words made of them."""
from pathlib import Path
import numpy as np
import pytest
from scipy.stats import binom
from kdocr.core import KdocrError
from kdocr.config import Config
from kdocr.metrics import Prediction
from kdocr.run import RunFolder
from kdocr.compare import Run, arms_table, bootstrap_difference, comparisons, control_of, finished_runs, labels, mcnemar, paired, read_log, read_run, runs_to_read, verdict


def rows(right, n=100):
    return [Prediction(f't{i:03}', f'ABC{i:04}', f'ABC{i:04}' if i < right else 'A', .9) for i in range(n)]

def student(name, right, **kw):
    return Run(Path(name), Config(name=name, mode='student', teacher_checkpoint='t.pth', **kw), {'val': rows(1, 2), 'test': rows(right)})


def test_mcnemar_is_the_binomial_tail():
    a, b = np.zeros(40, bool), np.zeros(40, bool)
    a[:3], b[10:22] = True, True
    assert mcnemar(a, b) == (3, 12, pytest.approx(2 * binom.cdf(3, 15, .5)))
    assert mcnemar(a, a) == (0, 0, 1.)

def test_bootstrap_meets_the_normal_interval_and_is_repeatable():
    rng = np.random.default_rng(0)
    a, b = rng.random(2000) < .5, rng.random(2000) < .6
    got = bootstrap_difference(a, b, [str(i) for i in range(2000)])
    se = (b.astype(float) - a).std() / 2000**.5
    assert got.mean == pytest.approx(b.mean() - a.mean())
    assert (got.lo, got.hi) == (pytest.approx(got.mean - 1.96 * se, abs=.003), pytest.approx(got.mean + 1.96 * se, abs=.003))
    assert got == bootstrap_difference(a, b, [str(i) for i in range(2000)])

def test_tracks_of_one_plate_count_as_one():
    a, b = np.zeros(100, bool), np.arange(100) < 50
    alone, together = (bootstrap_difference(a, b, g) for g in ([str(i) for i in range(100)], [str(i // 10) for i in range(100)]))
    assert alone.mean == together.mean == .5
    assert (together.hi - together.lo) == pytest.approx(10**.5 * (alone.hi - alone.lo), rel=.2)

def test_pairing_is_by_track_and_refuses_other_tracks():
    a, b, texts = paired(rows(60), rows(70)[::-1])
    assert (a.sum(), b.sum(), (a & b).sum(), len(set(texts))) == (60, 70, 60, 100)
    with pytest.raises(KdocrError, match='different tracks'): paired(rows(60), rows(60, 99))

def test_a_control_shares_everything_but_the_distillation():
    run, control = student('d', 70), student('c', 60, distill_weight=0)
    others = [student(f'o{i}', 60, distill_weight=0, **kw) for i, kw in enumerate((dict(seed=1), dict(steps=9), dict(student_init='teacher'), dict(lr=1e-3)))]
    assert control_of(run, [run, *others, control]) is control
    assert control_of(run, [run, *others]) is None and control_of(control, [run, control]) is None

def test_labels_say_what_differs_and_no_more():
    assert labels([student('a', 1).cfg, student('b', 1, threads=2, distill_weight=0).cfg]) == ['random init, distilled', 'random init, control']
    assert labels([student('a', 1).cfg, student('b', 1, seed=3).cfg]) == ['random init, distilled, seed 0', 'random init, distilled, seed 3']

@pytest.mark.parametrize('right, words', [(80, 'better than its control, +20.0'), (61, 'no certain difference, +1.0'), (40, 'worse than its control, -20.0')])
def test_verdict_in_words(right, words):
    runs = [student('c', 60, distill_weight=0), student('d', right)]
    said = verdict(runs)
    assert words in said[1] and 'One seed each' in said[-1]
    assert said[0].startswith(f'Best of 2 students on 100 held-out low-resolution tracks: random init, {"distilled" if right > 60 else "control"}')

def test_table_and_comparison_columns():
    runs = [student('c', 60, distill_weight=0), student('d', 70)]
    t, c = arms_table(runs), comparisons(runs)
    assert list(t.exact) == [.6, .7] and (t.lo < t.exact).all() and (t.hi > t.exact).all()
    assert (c.won[0], c.lost[0], c.p[0]) == (10, 0, pytest.approx(2 * .5**10))
    assert comparisons(runs[:1]).empty

def test_reading_run_folders(tmp_path, capsys):
    run = RunFolder(tmp_path/'r')
    run.claim(Config(name='r', out=tmp_path), {}, {})
    with pytest.raises(KdocrError, match='not finished'): read_run(run.path)
    with pytest.raises(KdocrError, match='not a run folder'): read_run(tmp_path)
    run.log.add([dict(step=1, ctc=2.)])
    run.finish({'val': rows(3, 5)})
    assert read_run(run.path).preds == rows(3, 5) and read_log(run.path).ctc.tolist() == [2.]
    assert finished_runs(tmp_path) == runs_to_read([], tmp_path) == [run.path]
    assert runs_to_read([], tmp_path/'none') == [] and 'kdocr demo' in capsys.readouterr().out
