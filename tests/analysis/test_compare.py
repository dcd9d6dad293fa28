"""Statistics with known answers, and the words made of them."""
import json
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, t as student_t
from kdocr.core import KdocrError, read_json, write_json
from kdocr.config import Config, uses_teacher
from kdocr.metrics import Prediction
from kdocr.training.run_folder import RunFolder
from kdocr.analysis.compare import _DISTILLATION, _METHOD, _ONE_SEED, arms_table, compare_runs, _comparison, comparisons, control_of, group_arms, _judge, verdict
from kdocr.analysis.statistics import Interval, bootstrap_difference, mcnemar, paired, t_interval
from kdocr.analysis.finished_runs import Run, data_of, find_runs, _finished_runs, run_labels, read_log, read_run, runs_to_read
from kdocr.analysis.alignment import alignment_table, term_shares


def rows(right, n=100):
    return [Prediction(f't{i:03}', f'ABC{i:04}', f'ABC{i:04}' if i < right else 'A', .9) for i in range(n)]

def student(name, right, facts={}, n=100, **kw):
    return Run(Path(name), Config(name=name, mode='student', teacher_checkpoint='t.pth', **kw), {'val': rows(1, 2), 'test': rows(right, n)}, facts)

def arm_of(name, right, **kw): return [student(f'{name}{s}', r, arm=name, seed=s, **kw) for s, r in enumerate(right)]

CTC, SOFT = arm_of('ctc', (60, 58, 62), distill_weight=0), arm_of('soft', (70, 69, 71), control='ctc', distill_terms='kl')


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
    assert run_labels([student('a', 1).cfg, student('b', 1, threads=2, distill_weight=0).cfg]) == ['random init, distilled', 'random init, control']
    assert run_labels([student('a', 1).cfg, student('b', 1, seed=3).cfg]) == ['random init, distilled, seed 0', 'random init, distilled, seed 3']

@pytest.mark.parametrize('right, points', [(80, '+20.0'), (61, '+1.0'), (40, '-20.0')])
def test_one_seed_never_wins(right, points):
    said = verdict([student('c', 60, distill_weight=0), student('d', right)])
    assert f'not enough seeds to say (1 of 3); these weights read {points} points' in said[1] and 'McNemar p' in said[1] and said[-1] == _ONE_SEED
    assert not any('better than' in s or 'worse than' in s for s in said)
    assert said[0].startswith(f'Best of 2 students on 100 held-out low-resolution tracks: random init, {"distilled" if right > 60 else "control"}')

@pytest.mark.parametrize('right, words', [((70, 69, 71), 'soft: better than its control ctc, +10.0 points over 3 seeds'), ((61, 58, 61), 'soft: no certain difference to its control ctc, +0.0 points'),
                                          ((50, 48, 53), 'soft: worse than its control ctc, -9.7 points'), ((90, 59, 61), 'soft: no certain difference'), ((70, 69), 'soft against ctc: not enough seeds to say (2 of 3)')])
def test_verdict_over_seeds(right, words):
    said = verdict(CTC + arm_of('soft', right, control='ctc'))
    assert words in said[1] and _METHOD in said and 'McNemar' not in ' '.join(said)

def test_better_needs_both_intervals():
    sure, unsure = Interval(1, .5, 1.5), Interval(1, -.5, 2.5)
    assert [_judge(3, *x) for x in ((sure, sure), (sure, unsure), (unsure, sure))] == ['better', 'no certain difference', 'no certain difference']
    low, touching = Interval(-1, -1.5, -.5), Interval(.5, 0, 1)
    assert _judge(5, low, low) == 'worse' and _judge(3, touching, sure) == 'no certain difference' and _judge(2, sure, sure) == 'not enough seeds to say'

def test_t_interval_by_hand():
    m, lo, hi = t_interval([1, 2, 4])
    half = student_t.ppf(.975, 2) * np.std([1, 2, 4], ddof=1) / 3**.5
    assert (m, lo, hi) == (pytest.approx(7 / 3), pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))
    assert np.isnan(t_interval([1.]).lo)

def test_plates_are_shared_by_the_seeds_that_read_them():
    rng = np.random.default_rng(0)
    a, b, names = rng.random(500) < .5, rng.random(500) < .6, [str(i) for i in range(500)]
    one, copies = bootstrap_difference(a, b, names), bootstrap_difference(np.stack([a] * 4), np.stack([b] * 4), names)
    assert copies == one                                                     # four copies of one run are one run
    apart = bootstrap_difference(rng.random((4, 500)) < .5, rng.random((4, 500)) < .6, names)
    assert apart.hi - apart.lo < .8 * (one.hi - one.lo)                      # four independent ones know more

def test_the_spread_of_seeds_widens_the_interval():
    a, names = np.zeros((3, 2000), bool), [str(i) for i in range(2000)]
    b = np.stack([np.arange(2000) < n for n in (200, 400, 600)])
    got = bootstrap_difference(a, b, names)
    assert got.mean == pytest.approx(.2) and got.hi - got.lo > 4 * 1.96 * (.2 * .8 / 2000)**.5
    assert got.lo == pytest.approx(.1, abs=.02) and got.hi == pytest.approx(.3, abs=.02)   # three equal draws of one seed: 1/27 each

def test_no_gain_at_all_is_exactly_zero():
    a = np.random.default_rng(1).random((3, 301)) < .5
    assert bootstrap_difference(a, a[[1, 2, 0]], ['p'] * 301) [0] == pytest.approx(0) and bootstrap_difference(a, a, [str(i % 70) for i in range(301)]) == (0, 0, 0)

def test_crossed_variance_is_owens():
    "Variance of the mean over draws: seeds and plates each on their own, as the algebra of independent weights has it."
    rng = np.random.default_rng(3)
    gain = rng.normal(0, .05, (5, 1)) + rng.normal(0, .3, 400)               # no interaction
    got = bootstrap_difference(np.zeros((5, 400)), gain, [str(i) for i in range(400)], draws=20000)
    want = gain.mean(1).var() / 5 + gain.mean(0).var() / 400
    assert ((got.hi - got.lo) / 3.92)**2 == pytest.approx(want, rel=.15)

def test_arms_are_methods_and_their_seeds():
    arms = group_arms([SOFT[2], CTC[1], SOFT[0], CTC[0], SOFT[1]])
    assert [(a.name, a.seeds) for a in arms] == [('soft', [0, 1, 2]), ('ctc', [0, 1])]
    unnamed = [student(f'{w}{s}', 9, seed=s, distill_weight=w) for w in (0, 1, 2) for s in (0, 1)]
    assert [(a.name, a.seeds) for a in group_arms(unnamed)] == [('random init, control', [0, 1]), ('random init, distilled, distill_weight 1.0', [0, 1]), ('random init, distilled, distill_weight 2.0', [0, 1])]

def test_other_teachers_make_other_arms_but_not_for_a_control():
    taught = [student(f'd{h}', 9, {'teacher_hash': h}) for h in 'ab']
    plain = [student(f'c{i}', 9, {'teacher_hash': h}, distill_weight=0, seed=i) for i, h in enumerate(('a', 'b', None))]
    assert [a.name for a in group_arms(taught + plain)] == ['random init, distilled, teacher_hash a', 'random init, distilled, teacher_hash b', 'random init, control']

@pytest.mark.parametrize('more, said', [
    (lambda: CTC[:1], 'ctc0: given twice'),
    (lambda: [student('copy', 60, arm='ctc', distill_weight=0)], 'ctc0 and copy: one arm, and seed 0 in both'),
    (lambda: [student('x', 60, arm='ctc', distill_weight=0, seed=7, lr=1e-3, steps=5)], "ctc0 and x: both are called arm 'ctc', but steps is None and 5; lr is 0.003 and 0.001"),
    (lambda: [student('x', 60, {'steps': 9}, arm='ctc', distill_weight=0, seed=7)], 'steps taken is None and 9'),
    (lambda: [student('x', 60, {'split_hash': 'ff'})], 'ctc0 and x: split_hash is None and ff'),
    (lambda: [student('x', 60, {'data_fingerprint': 'ff'})], 'ctc0 and x: data_fingerprint is None and ff'),
    (lambda: [student('x', 60, n=90)], r'ctc0 and x: .*different tracks \(100 and 90, 90 in common\)')])
def test_what_cannot_stand_together_is_named(more, said):
    with pytest.raises(KdocrError, match=said): verdict(CTC + more())

@pytest.mark.parametrize('kw, said', [(dict(steps=9), 'steps is 9 and None'), (dict(lr=1e-3), 'lr is 0.001 and 0.003'), (dict(student_init='teacher'), "student_init is 'teacher' and 'random'"),
                                      (dict(label_frac=.5), 'label_frac is 0.5 and 1.0'), (dict(unlabelled='pseudo_label'), 'a teacher teaches it .distill_weight 0, unlabelled pseudo_label'),
                                      (dict(distill_weight=2), 'a teacher teaches it .distill_weight 2, unlabelled drop'), (dict(n_fixed_augs=4), 'n_fixed_augs is 4 and 0')])
def test_a_named_control_is_checked(kw, said):
    wrong = arm_of('wrong', (60, 60, 60), **{'distill_weight': 0, **kw})
    with pytest.raises(KdocrError, match=f"arm 'soft': 'wrong' is not a control: .*{said}"): comparisons(wrong + arm_of('soft', (70,), control='wrong'))
    with pytest.raises(KdocrError, match="'wrong' is not a control"): comparisons(CTC + SOFT + wrong, 'wrong')

def test_distillations_own_settings_need_not_agree():
    own = dict(distill_weight=.5, distill_taps='logits', distill_terms='kl', grad_balance=1., grad_log_every=9, mutual_weight=1., clean_hr_guided=False, model_type='restran', teacher_cache='off', teacher_precision='fp32',
               unlabelled='distill', pseudo_label_conf=.5)
    assert own.keys() == set(_DISTILLATION)
    got = comparisons(CTC + arm_of('all', (70, 70, 70), **own))
    assert (got.control[0], got.seeds[0]) == ('ctc', [0, 1, 2])

def test_a_start_from_the_teacher_needs_the_same_teacher():
    warm = dict(student_init='teacher')
    a, c, other = student('a', 70, {'teacher_hash': 'a'}, **warm), student('c', 60, {'teacher_hash': 'a'}, distill_weight=0, **warm), student('o', 60, {'teacher_hash': 'b'}, distill_weight=0, **warm)
    assert control_of(a, [a, other, c]) is c and control_of(a, [a, other]) is None

def test_guided_is_whoever_listens_to_a_teacher():
    def g(**kw): return uses_teacher(Config(mode='student', teacher_checkpoint='t.pth', **kw))
    assert g() and g(distill_weight=0, unlabelled='pseudo_label') and not g(distill_weight=0) and not g(distill_taps='') and not g(distill_terms='') and not uses_teacher(Config())

def test_no_gain_without_a_control():
    said = verdict(SOFT)
    assert "soft: no control, so no gain (its control 'ctc' is not among the runs)" in said[1] and 'train_kd --config soft0/config.yaml --distill_weight 0 --unlabelled drop --arm ctc' in said[1]
    assert comparisons(SOFT).empty and not any('points' in s for s in said)
    two = arm_of('c1', (60,), distill_weight=0) + arm_of('c2', (60,), distill_weight=0) + arm_of('d', (70,))
    assert 'several arms could be its control (c1, c2): name one' in verdict(two)[1]
    assert comparisons(two, 'c2').control.tolist() == ['c2']
    assert "it shares no seed with its control 'ctc'" in verdict(CTC[:1] + SOFT[1:])[1]

def test_seeds_without_a_partner_are_left_out_and_said():
    got, said = comparisons(CTC[:2] + SOFT), verdict(CTC[:2] + SOFT)
    assert (got.seeds[0], got.left_out[0]) == ([0, 1], [2]) and got['each'][0] == pytest.approx([.1, .11])
    assert any('soft: left out of the gain, because only one of the two arms has it: seed 2.' == s for s in said)

def test_table_and_comparison_columns():
    runs = [student('c', 60, distill_weight=0), student('d', 70)]
    t, c = arms_table(runs), comparisons(runs)
    assert list(t.exact_match) == [.6, .7] and (t.lo < t.exact_match).all() and (t.hi > t.exact_match).all()
    assert (c.won[0], c.lost[0], c.p[0]) == (10, 0, pytest.approx(2 * .5**10)) and np.isnan(c.t_lo[0])
    assert comparisons(runs[:1]).empty
    t = arms_table(CTC + SOFT)
    assert list(t.seeds) == [3, 3] and t.sd.tolist() == [pytest.approx(.02), pytest.approx(.01)] and (t.lowest[0], t.highest[0]) == (.58, .62)

def test_a_teacher_is_listed_and_not_compared():
    teacher = Run(Path('t'), Config(name='t'), {'val': rows(9, 10), 'test': rows(20)})
    assert list(arms_table([teacher, *CTC]).arm) == ['HR teacher, reading HR', 'HR teacher, reading LR', 'ctc']
    assert verdict([teacher, *CTC, *SOFT])[-1] == "For scale: the teacher reads 90.0 % of held-out HR pictures and 20.0 % of the students' LR pictures."
    assert verdict([teacher]) == ['No student among the runs: nothing to compare.']
    with pytest.raises(KdocrError, match='no finished student'): compare_runs([teacher])

def test_json_holds_what_a_paper_needs():
    text, kept, gains = compare_runs(CTC + SOFT[:2] + arm_of('bare', (50,), steps=9))
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept == _comparison(CTC + SOFT[:2] + arm_of('bare', (50,), steps=9))
    assert [a['arm'] for a in kept['arms']] == ['soft', 'ctc', 'bare'] and [a['gain'] for a in kept['arms']] == ['+10.5', 'control', 'no control']
    assert [(r['seed'], r['exact_match']) for r in kept['arms'][1]['runs']] == [(0, .6), (1, .58), (2, .62)] and kept['arms'][0]['settings']['distill_terms'] == ['kl']
    g = kept['gains'][0]
    assert g['each'] == pytest.approx([.1, .11]) and g['lo'] < g['mean'] < g['hi'] and g['t_lo'] < g['lo'] and g['judged'] == 'not enough seeds to say'
    assert (kept['method']['draws'], kept['method']['seed'], kept['tracks']) == (4000, 0, 100) and 'Owen 2007' in kept['method']['bootstrap'] and _METHOD in kept['warnings']
    assert kept['no_control'] == {'bare': 'no run without distillation shares its other settings'}
    assert text.splitlines()[1].startswith('soft') and list(gains.arm) == ['soft']

def test_validation_alone_is_called_flattering():
    runs = [r._replace(parts={'val': r.preds}) for r in CTC + SOFT]
    assert any('validation tracks' in s for s in verdict(runs)) and not any('validation tracks' in s for s in verdict(CTC + SOFT))

def test_term_shares():
    log = pd.DataFrame(dict(step=[1, 2, 2], ctc=[3., 1., None], kd_logits=[9., 9., None], kd_logits_weighted=[1., 1., None], val_exact_match=[None, None, .1]))
    assert term_shares(log) == dict(ctc=.625, kd_logits=.375) and term_shares(pd.DataFrame()) == {}

def test_reading_run_folders(tmp_path, capsys):
    run = RunFolder(tmp_path/'r')
    run.claim(Config(name='r', out=tmp_path), {}, {})
    with pytest.raises(KdocrError, match='not finished'): read_run(run.path)
    with pytest.raises(KdocrError, match='not a run folder'): read_run(tmp_path)
    run.log.add([dict(step=1, ctc=2.)])
    run.finish({'val': rows(3, 5)})
    assert read_run(run.path).preds == rows(3, 5) and read_log(run.path).ctc.tolist() == [2.]
    assert _finished_runs(tmp_path) == runs_to_read([], tmp_path) == [run.path]
    assert find_runs([tmp_path]) == ([run.path], [])
    begun = RunFolder(tmp_path/'begun'); begun.claim(Config(name='begun', out=tmp_path), {}, {})
    assert find_runs([tmp_path]) == ([run.path], [begun.path]) == find_runs([run.path, begun.path])
    with pytest.raises(KdocrError, match='/nowhere: not a run folder'): find_runs(['/nowhere'])
    assert runs_to_read([], tmp_path/'none') == [] and 'kdocr demo' in capsys.readouterr().out

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A teacher, a control and two taught students, ten steps each."
    from small_runs import small
    from kdocr.training.train_kd import train_kd
    out = tmp_path_factory.mktemp('results')
    train_kd(small(out, mode='teacher', name='teacher'))
    taught = dict(mode='student', teacher_checkpoint=str(out/'teacher_best.pth'))
    for name, kw in (('ctc', dict(mode='student', distill_weight=0)), ('mse', taught), ('other', dict(taught, seed=1))): train_kd(small(out, name=name, arm=name, **kw))
    return out

def test_alignment_beside_accuracy(trained):
    runs = [read_run(p) for p in _finished_runs(trained)]
    frame, missing = alignment_table(runs, tracks=6)
    assert not missing and len(frame) == 9 and set(frame.tap) == {'backbone_out', 'transformer_out', 'logits'} and frame.cka.between(-.5, 1).all() and (frame.n == 4).all()
    assert frame.groupby('arm').control.first().to_dict() == dict(ctc=True, mse=False, other=False)

def test_alignment_is_cka_of_lr_student_and_hr_teacher(trained):
    import torch
    from kdocr.distill.similarity import linear_cka
    from kdocr.data.batches import open_data
    from kdocr.training.run_folder import load_model
    run = read_run(trained/'mse')
    frame, _ = alignment_table([run], tracks=3)
    lr, hr = (open_data(run.cfg.model_copy(update=dict(mode=m))).val.batch(torch.tensor([0, 1, 3]), 0).images for m in ('student', 'teacher'))
    with torch.no_grad(): s, t = load_model(trained/'mse/checkpoints/best.pth').forward_taps(lr), load_model(trained/'teacher_best.pth').forward_taps(hr)
    assert frame.set_index('tap').cka['logits'] == pytest.approx(linear_cka(s.logits, t.logits)) and frame.n.tolist() == [3] * 3

def test_a_control_without_a_teacher_needs_one_to_be_measured(trained):
    ctc = read_run(trained/'ctc')
    frame, left = alignment_table([ctc])
    assert len(frame) == 0 and 'names no teacher' in left[str(ctc.path)]
    assert len(alignment_table([ctc], teacher=trained/'teacher_best.pth')[0]) == 3

def test_who_is_left_out_of_the_scatter_is_named(trained, tmp_path):
    mse, other = read_run(trained/'mse'), read_run(trained/'other')
    gone = other._replace(cfg=other.cfg.model_copy(update=dict(teacher_checkpoint=Path('/nowhere/t.pth'))))
    moved = other._replace(path=tmp_path/'other', cfg=other.cfg.model_copy(update=dict(data=Path('/nowhere'))))
    changed = other._replace(facts=dict(other.facts, teacher_hash='abcd'))
    for run, why in ((gone, 'its teacher is not at /nowhere/t.pth'), (moved, 'its data are gone, there is no folder /nowhere'), (changed, 'is another teacher now')):
        frame, missing = alignment_table([mse, run], tracks=6)
        assert list(dict.fromkeys(frame.run)) == ['mse'] and why in missing[str(run.path)]

def test_data_are_found_from_any_folder(trained, tmp_path, monkeypatch):
    "A relative path begins where the run was started, and that is told by the run folder; else env.json has it."
    import shutil
    from small_runs import drawn
    project = tmp_path/'project'
    shutil.copytree(trained/'mse', project/'results/mse')
    shutil.copytree(drawn(), project/'plates')
    cfg = dict(out=Path('results'), data=Path('plates'), teacher_checkpoint=Path('results/teacher_best.pth'))
    shutil.copy(trained/'teacher_best.pth', project/'results')
    run = read_run(project/'results/mse')
    run = run._replace(cfg=run.cfg.model_copy(update=cfg))
    (tmp_path/'plates').mkdir()                                        # another folder of that name, where the analysis is run
    monkeypatch.chdir(tmp_path)
    env = read_json(project/'results/mse/env.json')
    assert env['data'] == str(Path(drawn()).absolute()) == str(data_of(run.path, run.cfg))
    write_json(project/'results/mse/env.json', {k: v for k, v in env.items() if k != 'data'})
    assert data_of(run.path, run.cfg) == project/'plates' and len(alignment_table([run], tracks=6)[0]) == 3
    relative = run._replace(path=Path('project/results/mse'))
    assert data_of(relative.path, relative.cfg) == project/'plates'
    shutil.move(project/'plates', project/'results/plates')            # with its runs
    assert data_of(run.path, run.cfg) == project/'results/plates'
    write_json(project/'results/mse/env.json', dict(env, data='/nowhere'))
    shutil.rmtree(project/'results/plates')
    assert data_of(run.path, run.cfg) == tmp_path/'plates'                           # what it has not is for the fingerprint to find out
    (tmp_path/'plates').rmdir()
    with pytest.raises(KdocrError, match='there is no folder /nowhere nor .*project/plates nor .*'): data_of(run.path, run.cfg)

@pytest.mark.slow
def test_recipes_runs_and_says_how_to_make_runs(trained, tmp_path):
    import nbformat
    from kdocr.jobs.notebooks import run_notebook
    def said(**params): return ' '.join(str(o.get('text', '')) for c in nbformat.read(run_notebook('recipes', tmp_path, params), 4).cells if c.cell_type == 'code' for o in c.outputs)
    assert 'kdocr demo' in said(out=tmp_path)
    text = said(runs=[trained], out=tmp_path, tracks=6)
    assert 'not what causes what' in text and 'of the 3 students' in text.replace('Best of 3', 'of the 3')
    assert (tmp_path/'figures/alignment_accuracy.pdf').is_file() and (tmp_path/'figures/forest.png').is_file()


def test_the_settings_that_decide_the_data_exist():
    from kdocr.analysis.alignment import _DATA_SETTINGS
    assert set(_DATA_SETTINGS) <= Config.model_fields.keys() and len(set(_DATA_SETTINGS)) == len(_DATA_SETTINGS)
