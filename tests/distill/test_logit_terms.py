"Distillation terms on logits: known answers, invariances, exact identities, gradients, refusals."
import inspect
import math
import pytest, torch
from torch.nn import functional as F
from kdocr.charset import Charset
from kdocr.core import KdocrError
from kdocr.distill.ctc import char_posteriors, ctc_loss, greedy_read, log_likelihood
from kdocr.distill.logit_terms import (LOGIT_TERMS, STEPS, _apart, _decouple, kl_char_aligned, dist, dkd, kl,
                                       logit_mse, kl_time_mean, seq_kd, kl_std)
from kdocr.distill.losses import tap_mse

CS, AB = Charset(), Charset('AB')

def randn(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def pair(b=3, t=16, c=37, scale=2., dtype=torch.float32): return scale*randn(b, t, c, dtype=dtype), scale*randn(b, t, c, seed=1, dtype=dtype)

def say(*lines, sure=6.): # a letter or digit is its class, '-' the blank
    ids = torch.tensor([[0 if c == '-' else CS.encode(c)[0] for c in line] for line in lines])
    return sure*F.one_hot(ids, len(CS)) # (b,t,37)

def called(name, s, t, texts=('AB', 'BA', 'B'), cs=AB, **options):
    "Any term, with what it needs beside the logits; the student's alignment is a constant."
    f = LOGIT_TERMS.get(name, logit_mse)
    if name == 'kl_char_aligned': return f(s, t, *(char_posteriors(x.detach(), list(texts[:len(x)]), cs) for x in (s, t)), **options)
    return f(s, t, cs, **options) if name == 'seq_kd' else f(s, t, **options)

ALL = ['mse', *LOGIT_TERMS]
MASKED = [n for n in ALL if 'steps' in inspect.signature(LOGIT_TERMS.get(n, logit_mse)).parameters]

# ---- every term

def test_names(): assert list(LOGIT_TERMS) == ['kl', 'kl_std', 'dist', 'dkd', 'kl_time_mean', 'kl_char_aligned', 'seq_kd']

@pytest.mark.parametrize('name', ALL)
def test_a_scalar_in_fp32_and_nothing_reaches_the_teacher(name):
    s, t = (x.bfloat16().requires_grad_() for x in pair(c=3))
    loss = called(name, s, t)
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss > 0
    assert s.grad.isfinite().all() and s.grad.abs().sum() > 0 and t.grad is None

@pytest.mark.parametrize('name', [n for n in ALL if n != 'seq_kd'])
def test_a_copy_costs_nothing(name):
    _, t = pair(c=3)
    s = t.clone().requires_grad_()
    loss = called(name, s, t); loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5) and s.grad.abs().max() < 1e-5

OPTIONS = [('mse', {}), ('kl', {}), ('kl', dict(temperature=3.)), ('kl_std', {}), ('dist', {}), ('dist', dict(beta=.5, gamma=2., temperature=2.)), ('dkd', {}),
           ('kl_time_mean', dict(temperature=1.5)), ('kl_char_aligned', {}), ('kl_char_aligned', dict(temperature=2.)), ('seq_kd', {})]

@pytest.mark.parametrize('name,options', OPTIONS + [(n, o | {'steps': k}) for n, o in OPTIONS if n in MASKED for k in ('nonblank_teacher', 'nonblank_any')])
def test_gradient(name, options):
    s, t = pair(t=5, c=3, dtype=torch.float64)
    t[0, :, 1:] -= 9 # a track on which the teacher says nothing
    when = [char_posteriors(x, ['AB', 'BA', 'B'], AB) for x in (s, t)]
    f = (lambda x: kl_char_aligned(x, t, *when, **options)) if name == 'kl_char_aligned' else lambda x: called(name, x, t, **options)
    assert torch.autograd.gradcheck(f, s.requires_grad_())

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('scale', [50., 1000.])
def test_confident_networks_stay_finite(name, scale):
    s, t = (scale*randn(3, 16, 37, seed=k).sign() for k in (0, 1))
    s.requires_grad_()
    loss = called(name, s, t, ['ABC1D23', 'AAA1111', 'XY'], CS); loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()

@pytest.mark.parametrize('name', ALL)
def test_equal_logits_stay_finite(name):
    s, t = torch.zeros(3, 6, 3, requires_grad=True), torch.zeros(3, 6, 3)
    loss = called(name, s, t); loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()

@pytest.mark.parametrize('name', ALL)
def test_shapes_that_differ(name):
    with pytest.raises(KdocrError, match=r'logits differ: the student \(3, 8, 3\), the teacher \(3, 16, 3\)'): called(name, torch.zeros(3, 8, 3), torch.zeros(3, 16, 3))

@pytest.mark.parametrize('name', ALL)
def test_options_are_checked_by_name(name):
    s, t = pair(c=3)
    bad = {'temperature': [0, -1., math.inf, math.nan, 'hot', True], 'steps': ['spokn', 'none', 3], 'alpha': [-1, math.inf, None], 'beta': [-1, math.nan],
           'gamma': [-.5, 'x'], 'confidence': [-.1, 1.1, math.nan, '1']}
    options = {k: p for k, p in inspect.signature(LOGIT_TERMS.get(name, logit_mse)).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert options and all(isinstance(p.default, (float, str)) for p in options.values())
    for k in options:
        for v in bad[k]:
            with pytest.raises(KdocrError) as e: called(name, s, t, **{k: v})
            assert str(e.value).startswith(f'{k}: {v!r}')

def test_steps_names_the_known_ones():
    with pytest.raises(KdocrError, match="did you mean 'nonblank_teacher'"): kl(*pair(), steps='nonblank_techer')
    with pytest.raises(KdocrError, match='known: all, nonblank_teacher, nonblank_any'): kl(*pair(), steps='x')

# ---- which steps count

@pytest.mark.parametrize('name', MASKED)
def test_only_counted_steps_count(name):
    s, t = pair(t=12, c=5)
    for x in (s, t): x[..., 0] += 2 # half of the steps are blank
    spoken = t.argmax(-1) > 0
    either = spoken | (s.argmax(-1) > 0)
    for steps, keep in (('all', torch.ones_like(spoken)), ('nonblank_teacher', spoken), ('nonblank_any', either)):
        alone = called(name, s[keep][None], t[keep][None]) # one long track of the steps that count
        assert called(name, s, t, steps=steps).item() == pytest.approx(alone.item(), rel=1e-4)
    assert spoken.sum() < either.sum() < spoken.numel()

@pytest.mark.parametrize('name', MASKED)
@pytest.mark.parametrize('steps', ['nonblank_teacher', 'nonblank_any'])
def test_where_nothing_counts_it_is_zero_with_a_gradient(name, steps):
    s, t = say('-'*8).requires_grad_(), say('-'*8, sure=3.)
    loss = called(name, s, t, cs=CS, steps=steps); loss.backward()
    assert loss.item() == 0 and (s.grad == 0).all()

@pytest.mark.parametrize('name', MASKED)
def test_either_sees_a_student_who_speaks_out_of_turn(name):
    t, s = say('-A-----', 'B------'), say('-A-CD--', 'B------')
    assert called(name, s, t, cs=CS, steps='nonblank_teacher').item() == pytest.approx(0, abs=1e-5) and called(name, s, t, cs=CS, steps='nonblank_any') > .01

def test_dist_of_one_step_has_no_variation_over_steps():
    s, t = randn(1, 1, 5).requires_grad_(), randn(1, 1, 5, seed=1)
    loss = dist(s, t, beta=0.); loss.backward()
    assert loss.item() == 0 and (s.grad == 0).all()

# ---- one by one

def test_mse_is_the_seeds():
    s, t = pair()
    assert logit_mse(s, t).item() == pytest.approx(tap_mse(s, t).item(), rel=1e-6)

def test_kl_known():
    t = torch.tensor([[[0., math.log(3)]]])
    assert kl(torch.zeros(1, 1, 2), t).item() == pytest.approx(.25*math.log(.5) + .75*math.log(1.5), rel=1e-5)
    s, t = pair()
    by_torch = F.kl_div((s/3).log_softmax(-1), (t/3).log_softmax(-1), log_target=True, reduction='sum')/(3*16)*9
    assert kl(s, t, temperature=3.).item() == pytest.approx(by_torch.item(), rel=1e-5)

def test_kl_gradient_is_student_minus_teacher():
    s, t = pair(dtype=torch.float64); s.requires_grad_()
    kl(s, t).backward()
    torch.testing.assert_close(s.grad, (s.softmax(-1) - t.softmax(-1)).detach()/(3*16))

def test_hot_kl_is_half_the_centred_mse():
    s, t = pair(dtype=torch.float64)
    d = s - t
    assert kl(s, t, temperature=1e4).item() == pytest.approx((d - d.mean(-1, keepdim=True)).square().mean().item()/2, rel=1e-3)

@pytest.mark.parametrize('name', [n for n in LOGIT_TERMS])
def test_a_constant_added_is_not_seen(name):
    s, t = pair(c=3, dtype=torch.float64)
    assert called(name, s + 5*randn(3, 16, 1, seed=2), t).item() == pytest.approx(called(name, s, t).item(), rel=1e-6)

def test_standard_kl_does_not_see_size():
    s, t = pair(dtype=torch.float64)
    a, c = 1 + randn(3, 16, 1, seed=2).abs(), 3*randn(3, 16, 1, seed=3)
    assert kl_std(a*s + c, t).item() == pytest.approx(kl_std(s, t).item(), rel=1e-4) == pytest.approx(kl_std(s, a*t + c).item(), rel=1e-4)
    z = lambda x: (x - x.mean(-1, keepdim=True))/x.std(-1, correction=0, keepdim=True)
    assert kl_std(s, t, temperature=3.).item() == pytest.approx(kl(z(s), z(t), temperature=3.).item(), rel=1e-5)

def test_dist():
    s, t = pair(dtype=torch.float64)
    p, q = t.softmax(-1), s.softmax(-1)
    for a in (.1, .9): assert dist((a*p + (1 - a)/37).log(), t).item() == pytest.approx(0, abs=1e-6) # scale and shift of probabilities
    r = lambda x, y: torch.corrcoef(torch.stack([x, y]))[0, 1].item()
    inter = 1 - sum(r(p[i, j], q[i, j]) for i in range(3) for j in range(16))/48
    intra = 1 - sum(r(p[..., k].flatten(), q[..., k].flatten()) for k in range(37))/37
    assert dist(s, t, gamma=0.).item() == pytest.approx(inter, rel=1e-6) and dist(s, t, beta=0.).item() == pytest.approx(intra, rel=1e-6)
    assert dist(s, t, beta=.5, gamma=2., temperature=1.).item() == pytest.approx(.5*inter + 2*intra, rel=1e-6)
    assert dist(2*s, 2*t, temperature=2.).item() == pytest.approx(4*(inter + intra), rel=1e-6)

def test_correlation_of_scale_shift_sign_and_of_what_does_not_vary():
    x, one, flat = randn(9, 2, dtype=torch.float64), torch.ones(9, 1, dtype=torch.float64), torch.full((9, 2), .3, dtype=torch.float64)
    for y, apart in ((3*x + 2, 0), (-x, 2), (flat, 1)):
        got, varies = _apart(y, x, one)
        assert got.tolist() == pytest.approx([apart]*2, abs=1e-9) and varies.tolist() == [1, 1]
    assert _apart(x, flat, one)[1].tolist() == [0, 0]

def test_dist_leaves_out_classes_that_the_teacher_never_tells_apart():
    t = say('-A-B', '-B-A')
    assert dist(t.clone(), t).item() == pytest.approx(0, abs=1e-5)
    silent = torch.zeros_like(t).requires_grad_()
    loss = dist(silent, t, beta=0.); loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-5) and silent.grad.isfinite().all()

def test_dkd_is_kl_taken_apart():
    s, t = pair(dtype=torch.float64)
    for T in (1., 4.):
        tckd, nckd, p = _decouple(s/T, t/T)
        torch.testing.assert_close(T**2*(tckd + (1 - p)*nckd).mean(), kl(s, t, temperature=T), rtol=1e-9, atol=1e-9)
        assert dkd(s, t, alpha=.7, beta=3., temperature=T).item() == pytest.approx(T**2*(.7*tckd + 3*nckd).mean().item(), rel=1e-9)
    best = torch.zeros_like(t).scatter_(-1, t.argmax(-1, keepdim=True), 1.)
    assert dkd(t + 4*best, t, alpha=0.).item() == pytest.approx(0, abs=1e-9) and dkd(t + 4*best, t, beta=0.) > .1 # only how sure
    assert dkd(*pair(c=2), alpha=0.).item() == pytest.approx(0, abs=1e-6) # two classes: no others

def test_mean_kl_does_not_see_time():
    s, t = pair()
    assert kl_time_mean(t[:, torch.randperm(16, generator=torch.manual_seed(0))], t).item() == pytest.approx(0, abs=1e-6)
    p, q = t.softmax(-1).mean(1), s.softmax(-1).mean(1)
    assert kl_time_mean(s, t).item() == pytest.approx((p*(p/q).log()).sum(-1).mean().item(), rel=1e-4)

def when(x, *texts): return char_posteriors(x, list(texts), CS)

def test_aligned_kl_does_not_mind_when_but_what():
    text = 'ABC1D23'
    t = say('-A-B-C--1-D-2-3--', sure=8.) + .3*randn(1, 17, 37); late = t.roll(1, 1)
    assert kl_char_aligned(late, t, when(late, text), when(t, text)) < .01 < 3 < kl(late, t)
    other = say('-A-B-C--1-D-2-8--', sure=8.) # he reads 8 for 3
    assert kl_char_aligned(other, t, when(other, text), when(t, text)) > .5
    back = t.flip(1)
    assert kl_char_aligned(back, t, when(back, text), when(t, text)) > 1 and kl_time_mean(back, t).item() == pytest.approx(0, abs=1e-5)

def test_aligned_kl_by_hand():
    s, t = pair(b=2)
    a, b = when(s, 'AB', '7'), when(t, 'AB', '7')
    hand = []
    for i, n in ((0, 2), (1, 1)):
        for k in range(n):
            q, p = (sum(c.where[i, k, j]*x[i, j].softmax(-1) for j in range(16)) for x, c in ((s, a), (t, b)))
            hand.append((p*(p/q).log()).sum().item())
    assert kl_char_aligned(s, t, a, b).item() == pytest.approx(sum(hand)/3, rel=1e-4) # three characters, whoever's they are

def test_aligned_kl_without_texts():
    s, t = pair(b=2)
    s.requires_grad_()
    for texts in (('', ''), (None, None)):
        loss = kl_char_aligned(s, t, when(s, *texts), when(t, *texts)); loss.backward()
        assert loss.item() == 0 and (s.grad == 0).all()
    labelled = kl_char_aligned(s, t, when(s, 'ABC', None), when(t, 'ABC', None)).item()
    assert labelled == pytest.approx(kl_char_aligned(s[:1], t[:1], when(s[:1], 'ABC'), when(t[:1], 'ABC')).item(), rel=1e-5)
    with pytest.raises(KdocrError, match=r'the texts differ: \(2, 3\) characters of the student, \(2, 2\) of the teacher'):
        kl_char_aligned(s, t, when(s, 'ABC', 'A'), when(t, 'AB', 'A'))

def test_sequence():
    s, t = randn(3, 16, 37), say('-A-B-C--1-D-2-3-', '-'*16, 'AA-A-B----------')
    t[2] *= 1.5
    p = log_likelihood(t, ['ABC1D23', '', 'AAB'], CS).exp().tolist()
    nats = [ctc_loss(s[i:i + 1], [x], CS).item() for i, x in ((0, 'ABC1D23'), (2, 'AAB'))]
    assert seq_kd(s, t, CS).item() == pytest.approx((p[0]*nats[0] + p[2]*nats[1])/3, rel=1e-5)
    assert p[0] < p[2] and seq_kd(s, t, CS, confidence=(p[0] + p[2])/2).item() == pytest.approx(p[2]*nats[1]/3, rel=1e-5)

def test_sequence_of_a_certain_teacher_is_ctc():
    s, t = randn(2, 16, 37), say('-A-B-C--1-D-2-3-', 'A-A-A-1-1-1-1---', sure=60.)
    assert seq_kd(s, t, CS).item() == pytest.approx(ctc_loss(s, ['ABC1D23', 'AAA1111'], CS).item(), rel=1e-5)

def test_sequence_where_none_counts():
    s = randn(2, 16, 37).requires_grad_()
    for t, confidence in ((say('-'*16, '-'*16), 0.), (say('-A-B------------', 'A---------------', sure=1.), .9)):
        loss = seq_kd(s, t, CS, confidence=confidence); loss.backward()
        assert loss.item() == 0 and (s.grad == 0).all()

def test_sequence_can_be_learnt():
    t = say('-A-B-C--1-D-2-3-', 'AA-AB-1-1--2-2--', sure=9.)
    s = randn(2, 16, 37).requires_grad_()
    opt = torch.optim.Adam([s], .3)
    for _ in range(80): opt.zero_grad(); seq_kd(s, t, CS).backward(); opt.step()
    assert [r.text for r in greedy_read(s, CS)] == ['ABC1D23', 'AAB1122']

def test_sequence_of_another_charset():
    with pytest.raises(KdocrError, match='the model has 37 classes, the charset 3'): seq_kd(*pair(), AB)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('name', [n for n in ALL if n != 'seq_kd'])
def test_no_term_waits_for_a_gpu(name):
    s, t = pair()
    texts = ['ABC1D23', 'AAA1111', 'XY']
    here = called(name, s, t, texts, CS)
    s, t = s.cuda().requires_grad_(), t.cuda()
    torch.cuda.set_sync_debug_mode('error')
    try: there = called(name, s, t, texts, CS); there.backward()
    finally: torch.cuda.set_sync_debug_mode('default')
    assert there.item() == pytest.approx(here.item(), rel=1e-4)
