"""Terms by name: what is written is what is computed, and what cannot be meant is refused before the first step."""
import math

import pytest
import torch

from kdocr.charset import Charset
from kdocr.config import load_config
from kdocr.core import KdocrError, read_json
from kdocr.distill.ctc import char_posteriors, ctc_loss
from kdocr.data.batches import labelled, open_data
from kdocr.training.distillation import GradBalance, TrainerDistill
from kdocr.training.networks import load_teacher, new_student
from kdocr.training.pseudo_labels import _pseudo_labels, with_pseudo_labels
from kdocr.distill.feature_terms import FEATURE_TERMS
from kdocr.distill.logit_terms import LOGIT_TERMS, kl_char_aligned, kl
from kdocr.distill.losses import align_pair, tap_mse
from kdocr.training.run_folder import RunFolder, load_checkpoint, load_model, plate_hashes, save_checkpoint, state_hash
from kdocr.models.taps import TapOut
from kdocr.distill.terms import (_DISTILL_TERMS, Schedule, _asks_for, options_of, parse_schedule, _parse_term,
                                 parse_terms, distill_losses)
from kdocr.training.trainer import EMA, Trainer, to_rows
from kdocr.training.train_kd import new_trainer, train_kd
from small_runs import same_end, small

TAPS, CS = ('backbone_out', 'transformer_out', 'logits'), Charset()


def out(b=3, t=16, d=96, c=37, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = lambda *shape: torch.randn(*shape, generator=g)
    return TapOut(f(b, t, c), {'backbone_out': f(b, t, d), 'transformer_out': f(b, t, d)})


# ---- written

def test_the_default_is_the_seed():
    s, t = out(), out(seed=1)
    terms = parse_terms(load_config().distill_terms, load_config().distill_taps)
    assert [(x.tap, x.name, x.weight, x.schedules) for x in terms] == [(tap, 'mse', 1., ()) for tap in TAPS]
    got = distill_losses(terms, s, t, ['A']*3, CS)
    want = {f'kd_{k}': tap_mse(*align_pair(k, s.logits if k == 'logits' else s.taps[k], t.logits if k == 'logits' else t.taps[k], None)) for k in TAPS}
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_every_part_of_a_term():
    term, = _parse_term('logits : kl(temperature=4, steps=nonblank_any) * 0.25 @ warmup(0.5) @ stop(0.75)', TAPS, TAPS)
    assert term.key == 'kd_logits_kl' and term.options == dict(temperature=4., steps='nonblank_any')
    assert [term.at(x) for x in (0, .25, .5, .74, .75, 1)] == [0, .125, .25, .25, 0, 0]
    s, t = out(), out(seed=1)
    assert distill_losses([term], s, t, ['A']*3, CS)['kd_logits_kl'] == kl(s.logits, t.logits, temperature=4., steps='nonblank_any')


def test_a_term_without_a_tap_stands_at_each_of_distill_taps():
    assert [t.key for t in parse_terms(['ln_mse', 'logits:dist'], ('backbone_out', 'logits'))] == ['kd_backbone_out_ln_mse', 'kd_logits_ln_mse', 'kd_logits_dist']


def test_a_config_reads_terms_from_a_shell_and_from_yaml(tmp_path):
    words = 'logits:kl(temperature=2,steps=nonblank_teacher)*0.5, backbone_out:cosine'
    (tmp_path/'c.yaml').write_text('distill_terms:\n- logits:kl(temperature=2,steps=nonblank_teacher)*0.5\n- backbone_out:cosine\n')
    assert load_config(distill_terms=words).distill_terms == load_config(tmp_path/'c.yaml').distill_terms == ('logits:kl(temperature=2,steps=nonblank_teacher)*0.5', 'backbone_out:cosine')


@pytest.mark.parametrize('name', _DISTILL_TERMS)
def test_every_term_teaches_the_student_alone(name):
    s, t = out(), out(seed=1)
    tap = 'logits' if name in LOGIT_TERMS or name == 'mse_steps' else 'backbone_out'
    for x in (s, t): at = x.logits if tap == 'logits' else x.taps[tap]; at.requires_grad_()
    value, = distill_losses(_parse_term(f'{tap}:{name}', TAPS, TAPS), s, t, ['AB1', None, 'A'], CS).values()
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    if name != 'seq_kd': assert value > 0 # a stranger reads something that a random teacher is not sure of
    value.backward()
    mine, theirs = (x.logits if tap == 'logits' else x.taps[tap] for x in (s, t))
    assert mine.grad.isfinite().all() and mine.grad.abs().sum() > 0 and theirs.grad is None


def test_characters_are_looked_for_in_the_text_or_in_what_the_teacher_reads():
    s, t = out(), out(seed=1)
    from kdocr.distill.ctc import greedy_read
    read = [r.text for r in greedy_read(t.logits, CS)]
    term = _parse_term('logits:kl_char_aligned', TAPS, TAPS)
    known, half = (distill_losses(term, s, t, texts, CS)['kd_logits_kl_char_aligned'] for texts in (read, [None, read[1], None]))
    assert torch.equal(known, half)
    chars = [char_posteriors(x.logits, read, CS) for x in (s, t)]
    assert torch.equal(known, kl_char_aligned(s.logits, t.logits, *chars))


@pytest.mark.parametrize('text,says', [
    ('logits:kll', "no term 'kll': did you mean 'kl'?"), ('logit:kl', "no tap 'logit': did you mean 'logits'?"),
    ('backbone_out:kl', 'kl compares classes and needs the tap logits, not backbone_out'), ('kl', 'needs the tap logits, not backbone_out'),
    ('logits:kl*-1', 'the weight -1 must be a finite number above 0'), ('logits:kl*inf', 'must be a finite number'), ('logits:kl*nan', 'must be a finite number'),
    ('logits:kl*0', 'leave the term out'), ('logits:kl*much', "'much' is no number"), ('logits:kl(temprature=2)', "kl has no option 'temprature': did you mean 'temperature'?"),
    ('cosine(power=2)', "cosine has no option 'power' (it has none)"), ('spp(levels=1.5)', '1.5 is no whole number'), ('spp(finest=maybe)', "'maybe' is neither true nor false"),
    ('mse@decay(0.5,0.2)', 'it ends before it begins'), ('mse@stop(0)', 'it ends before it begins'), ('mse@decay(0.5)', 'decay takes start and end'), ('mse@warm(0.1)', "did you mean 'warmup'?"),
    ('mse@warmup(2)', 'times are shares of the run'), ('mse@', 'is not written'), ('mse mse', "no term 'msemse'"), ('a:b:c', 'is not written')])
def test_what_cannot_be_meant_is_refused_by_name(text, says):
    with pytest.raises(KdocrError) as e: parse_terms([text], TAPS)
    assert says in str(e.value) and str(e.value).startswith('distill_terms: ')


def test_twice_the_same(): 
    with pytest.raises(KdocrError, match='logits is there 2 times'): parse_terms(['mse', 'logits:mse*2'], TAPS)


def test_the_command_refuses_before_anything_is_opened(tmp_path):
    with pytest.raises(KdocrError, match="no term 'kll'"): train_kd(load_config(mode='student', teacher_checkpoint='none.pth', data=str(tmp_path/'no_data'), out=str(tmp_path/'out'), distill_terms='logits:kll'))
    assert not (tmp_path/'out').exists()


def test_options_are_the_functions_own():
    assert options_of('kl') == dict(temperature=1., steps='all') and _asks_for('info_nce') == ['s_chars', 't_chars'] and _asks_for('seq_kd') == ['charset'] and _asks_for('mse') == []
    assert {*FEATURE_TERMS, *LOGIT_TERMS, 'mse', 'mse_steps'} == set(_DISTILL_TERMS)


# ---- in a run

@pytest.fixture(scope='module')
def teacher_run(tmp_path_factory): return train_kd(small(tmp_path_factory.mktemp('teacher'), name='hr'))

@pytest.fixture
def cfg(teacher_run, tmp_path): return small(tmp_path, name='lr', mode='student', teacher_checkpoint=str(teacher_run.published))

def also(cfg, **values): return load_config(**{**dict(cfg), **values})


def make(cfg):
    data = open_data(cfg)
    return new_trainer(cfg, RunFolder(cfg.out/cfg.name), data, load_teacher(cfg, data.split.hash))


def test_the_sum_is_what_the_terms_say(cfg):
    run = train_kd(also(cfg, distill_weight=.5, distill_terms='backbone_out:ln_mse, logits:kl(temperature=2)*3@warmup(0.5)'))
    for r in run.log.rows()[:10]:
        if 'loss' not in r: continue
        factor = min(1., (r['step'] - 1)/5)
        if factor: assert r['kd_logits_kl_weighted'] == pytest.approx(.5*3*factor*r['kd_logits_kl'], rel=1e-5)
        else: assert 'kd_logits_kl' not in r # not computed where it weighs nothing
        assert r['loss'] == pytest.approx(r['ctc'] + r['kd_backbone_out_ln_mse_weighted'] + r.get('kd_logits_kl_weighted', 0), rel=1e-5)


def test_a_term_that_has_stopped_leaves_plain_ctc(cfg):
    t, control = make(also(cfg, distill_terms='mse@stop(0.5)')), make(also(cfg, distill_weight=0., name='control'))
    t.step = control.step = 6
    t.frozen.forward_taps = lambda images: pytest.fail('the teacher was asked for nothing')
    torch.manual_seed(0); a = t.losses(t.batch(6))
    torch.manual_seed(0); b = control.losses(control.batch(6))
    assert a['loss'] == b['loss'] and set(a) == {'loss', 'ctc'}


def test_pulls_are_the_gradients_at_the_backbone(cfg):
    t = make(also(cfg, distill_terms='transformer_out:mse, logits:kl'))
    said = t.losses(t.batch(0))
    s, pivot = t.student_out(t.batch(0).images)
    guide = t.teacher_out(t.batch(0))
    ctc, mine = ctc_loss(s.logits, t.batch(0).texts, CS), tap_mse(s.taps['transformer_out'], guide.taps['transformer_out'])
    a, b = (torch.autograd.grad(x, pivot, retain_graph=True)[0].flatten() for x in (ctc, mine))
    assert said['ctc_grad'] == pytest.approx(a.norm().item(), rel=1e-4) and said['kd_transformer_out_grad'] == pytest.approx(b.norm().item(), rel=1e-4)
    assert said['kd_transformer_out_grad_cos'] == pytest.approx((a @ b/a.norm()/b.norm()).item(), abs=1e-4)


def test_balance_holds_each_pull_at_a_multiple_of_ctcs(cfg):
    t = make(also(cfg, grad_balance=.5, grad_log_every=1, distill_terms='backbone_out:mse*2, logits:kl'))
    said = t.losses(t.batch(0))
    for key, weight in (('kd_backbone_out', 2), ('kd_logits_kl', 1)):
        pull = said[f'{key}_grad']*said[f'{key}_weighted'].detach()/said[key].detach() # weighted
        assert pull.item() == pytest.approx(.5*weight*said['ctc_grad'].item(), rel=1e-4)


def test_measuring_changes_no_training(cfg):
    runs = [train_kd(also(cfg, name=f'probe{n}', grad_log_every=n)) for n in (0, 1)]
    assert state_hash(load_model(runs[0].last)) == state_hash(load_model(runs[1].last))


@pytest.mark.parametrize('how', [dict(ema=.9), dict(grad_balance=.5, grad_log_every=2), dict(mutual_weight=.5)])
def test_stopped_and_resumed_is_uninterrupted(cfg, how):
    whole = train_kd(also(cfg, name='whole', **how))
    t = make(also(cfg, name='parts', **how))
    class Stop(Exception): pass
    losses = t.losses
    def five(batch):
        if t.step == 5: raise Stop
        return losses(batch)
    t.losses = five
    with pytest.raises(Stop): t.fit()
    assert same_end(train_kd(also(cfg, name='parts', **how)), whole)


def test_the_average_is_what_is_kept(cfg):
    t = make(also(cfg, ema=.5, distill_weight=0.))
    mean = {k: v.clone() for k, v in t.model.state_dict().items() if v.is_floating_point()}
    for i, _ in zip(range(4), t.steps()):
        decay = min(.5, (1 + i)/(10 + i))
        mean = {k: decay*v + (1 - decay)*t.model.state_dict()[k] for k, v in mean.items()}
    for k, v in mean.items(): assert torch.allclose(t.eval_model.state_dict()[k], v, atol=1e-6), k


def test_the_average_is_what_is_scored(cfg):
    run = train_kd(also(cfg, ema=.5))
    last, best = load_checkpoint(run.last), load_checkpoint(run.best)
    if best['step'] == last['step']: assert all(torch.equal(v, last['average'][f'model.{k}']) for k, v in best['model'].items())
    assert any(not torch.equal(v, last['average'][f'model.{k}']) for k, v in last['model'].items())


def test_an_average_forgets_its_start():
    net = torch.nn.Linear(2, 2)
    mean = EMA(net)
    with torch.no_grad(): net.weight.fill_(3.)
    for i in range(200): mean.follow(net, .9, i)
    assert torch.allclose(mean.model.weight, net.weight) and not mean.train().model.training and not any(p.requires_grad for p in mean.parameters())


def test_mutual_the_teacher_learns_too_and_its_file_does_not(cfg, teacher_run):
    before = teacher_run.published.read_bytes()
    run = train_kd(also(cfg, mutual_weight=.5))
    last = load_checkpoint(run.last)
    moved = [k for k, v in load_checkpoint(cfg.teacher_checkpoint)['model'].items() if not torch.equal(v, last['teacher'][k])]
    assert any('conv' in k or 'weight' in k for k in moved) and teacher_run.published.read_bytes() == before
    assert {'teacher_ctc', 'teacher_mutual'} <= set(run.log.rows()[0])
    assert 'teacher' not in load_checkpoint(run.best)


@pytest.mark.parametrize('values,says', [
    (dict(grad_balance=1., grad_log_every=0), 'grad_balance: it needs the gradients'), (dict(distill_weight=0., mutual_weight=1.), 'mutual_weight: nothing is distilled'), (dict(distill_weight=0., unlabelled='distill'), 'unlabelled: distill: nothing is distilled'),
    (dict(mutual_weight=1., teacher_cache='on'), 'a teacher that trains'), (dict(distill_weight=0., teacher_checkpoint=None, unlabelled='pseudo_label'), 'unlabelled: pseudo_label needs a teacher'), (dict(label_frac=0.), 'label_frac'), (dict(ema=1.), 'ema')])
def test_settings_that_contradict_each_other(cfg, values, says):
    with pytest.raises(KdocrError, match=says): also(cfg, **values)


def test_a_term_that_is_no_number_stops_the_run_with_its_name_and_the_tracks(cfg):
    t = make(also(cfg, checkpoint_every=3))
    guide = t.teacher_out
    def broken(batch):
        out = guide(batch)
        if t.step == 7: out.taps['transformer_out'][0, 0, 0] = math.nan
        return out
    t.teacher_out = broken
    with pytest.raises(KdocrError, match=r'step 8: .*kd_transformer_out.* not finite, on the batch ') as e: t.fit()
    assert all(k in str(e.value) for k in t.batch(7).keys) and load_checkpoint(t.run.last)['step'] in (4, 6)


# ---- tracks without a label

def test_labels_are_nested_and_by_plate():
    texts = [f'ABC{i:04d}' for i in range(300) for _ in range(2)]
    few, more = labelled(texts, .1), labelled(texts, .3)
    assert len(few) == 30 and len(more) == 90 and few < more and labelled(texts[::-1], .1) == few and labelled(texts, 1.) == set(texts)


def test_unlabelled_tracks_leave_or_stay_without_a_text(cfg):
    whole = open_data(cfg).train
    drop, stay = open_data(also(cfg, label_frac=.3)).train, open_data(also(cfg, label_frac=.3, unlabelled='distill')).train
    known = labelled(whole.texts, .3)
    assert set(drop.texts) == known and len(stay) == len(whole) and stay.texts == [t if t in known else None for t in whole.texts]
    rows = torch.tensor([i for i, t in enumerate(stay.texts) if t is None][:2])
    assert stay.batch(rows).texts == [None, None] and torch.equal(stay.batch(rows).images, whole.batch(rows).images)
    hr = open_data(small(cfg.out, label_frac=.3)).train
    assert set(hr.texts) == known # a teacher learns from the same labels


def test_ctc_counts_labelled_tracks_alone():
    x = torch.randn(3, 16, 37, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = ctc_loss(x, ['ABC', None, 'D'], CS)
    assert torch.equal(loss, ctc_loss(x[[0, 2]], ['ABC', 'D'], CS))
    loss.backward()
    assert x.grad[1].abs().sum() == 0 < x.grad[0].abs().sum()
    none = ctc_loss(x, [None]*3, CS)
    none.backward()
    assert none == 0


def test_what_the_teacher_reads_becomes_a_label_where_it_is_sure(cfg, monkeypatch):
    c = also(cfg, label_frac=.3, unlabelled='pseudo_label', distill_weight=0.)
    data, teacher = open_data(c), load_teacher(c, open_data(c).split.hash)
    hidden = [i for i, t in enumerate(data.train.texts) if t is None]
    truth = [data.train.pack.texts[data.train.rows[i]] for i in hidden]
    said = [(t, .95) for t in truth]
    said[0], said[1], said[2] = ('WRONG99', .99), (truth[1], .5), ('', 1.)
    monkeypatch.setattr('kdocr.training.pseudo_labels._pseudo_labels', lambda *a: said)
    new, about = with_pseudo_labels(c, data, teacher)
    n = len(hidden)
    assert about == dict(labelled=len(data.train) - n, unlabelled=n, read=n - 2, right=n - 3, left_out=2)
    assert len(new.train) == len(data.train) - 2 and None not in new.train.texts and new.train.texts[new.train.keys.index(data.train.keys[hidden[0]])] == 'WRONG99'
    kept, about = with_pseudo_labels(also(c, distill_weight=1.), data, teacher)
    assert len(kept.train) == len(data.train) and kept.train.texts.count(None) == 2 and about['left_out'] == 0


def test_a_teacher_reads_all_five_frames(cfg):
    c = also(cfg, label_frac=.3, unlabelled='pseudo_label')
    data = open_data(c)
    class Says(torch.nn.Module):
        def forward_taps(self, x):
            self.seen = x.shape
            z = torch.full((len(x), 16, 37), -20.); z[..., 0] = 0; z[:, 3, 5] = 20
            return TapOut(z, {})
    model = Says()
    said = _pseudo_labels(model, data, c, [0, 1, 2])
    assert [t for t, _ in said] == ['4']*3 and all(p > .99 for _, p in said)


def test_a_run_says_what_became_of_its_labels(cfg):
    run = train_kd(also(cfg, label_frac=.3, unlabelled='distill'))
    about = read_json(run.path/'labels.json')
    assert about['labelled'] + about['unlabelled'] == len(open_data(cfg).train) and about['left_out'] == 0 and about['unlabelled'] > 0


# ---- teachers of other plates

def test_a_teacher_that_saw_none_of_our_plates_may_come_from_anywhere(cfg, teacher_run, tmp_path):
    ckpt, data = load_checkpoint(teacher_run.published), open_data(cfg)
    assert torch.equal(ckpt['train_plate_ids'], plate_hashes(open_data(small(tmp_path)).train.texts))
    def teacher(**values): return also(cfg, name='x', teacher_checkpoint=str(save_checkpoint(tmp_path/'t.pth', {**ckpt, 'split_hash': 'another', **values})))
    foreign = plate_hashes(['ZZZ9Z99'])
    assert not train_kd(teacher(train_plate_ids=foreign)) is None
    student = load_checkpoint(tmp_path/'x'/'checkpoints'/'best.pth')
    assert set(foreign.tolist()) < set(student['train_plate_ids'].tolist()) # who learns from it has seen them too
    with pytest.raises(KdocrError, match=rf"t.pth: split_hash is 'another'.*trained on 1 of the {len(set(data.val.texts + data.test.texts))} plates"):
        train_kd(also(teacher(train_plate_ids=plate_hashes([data.val.texts[0], 'ZZZ9Z99'])), name='y'))
    assert train_kd(also(teacher(train_plate_ids=plate_hashes(data.val.texts)), name='z', allow_leak=True)).finished
