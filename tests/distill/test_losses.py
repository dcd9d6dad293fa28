"Objectives: golden values, gradients, refusals; decoding; measures of alignment with known answers."
import math
import pytest, torch
from torch.nn import functional as F
from kdocr.distill.similarity import cosine_by_position, frame_agreement, linear_cka, pca_rgb, relative_mse, spikes
from kdocr.charset import Charset
from kdocr.core import KdocrError
from kdocr.distill.ctc import _CtcReading, check_spellable, ctc_loss, greedy_read
from kdocr.distill.losses import Projections, align_steps, tap_mse, total_loss
from kdocr.distill.terms import distill_losses as losses_of_terms, parse_terms
from kdocr.models.taps import TapOut

CS, TAPS = Charset(), ('backbone_out', 'transformer_out', 'logits')


def distill_losses(s, t, taps, project=None):
    "The reference recipe: mean squared error at each tap."
    return losses_of_terms(parse_terms(['mse'], taps) if taps else [], s, t, ['A']*len(t.logits), CS, project)

def randn(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def out(b=2, t=16, d=96, c=37, seed=0):
    return TapOut(randn(b, t, c, seed=seed), {'backbone_out': randn(b, t, d, seed=seed + 100), 'transformer_out': randn(b, t, d, seed=seed + 200)})

def say(*lines, sure=6.): # a letter or digit is its class, '-' the blank
    ids = torch.tensor([[0 if c == '-' else CS.encode(c)[0] for c in line] for line in lines])
    return sure*F.one_hot(ids, len(CS)) # (b,t,37)

# ---- ctc

def test_ctc_golden():
    loss = ctc_loss(torch.zeros(2, 16, 37), ['ABC1D23', 'AAA1111'], CS)
    # texts without repeats: C(T+n, 2n) paths; with r repeats: C(T+n-r, 2n)
    nats = [16*math.log(37) - math.log(math.comb(23 - r, 14)) for r in (0, 5)]
    assert loss.item() == pytest.approx(sum(nats)/7/2, rel=1e-5)

def test_ctc_gradient():
    x = randn(2, 6, 4, dtype=torch.float64).requires_grad_()
    abc = Charset('ABC')
    # ctc_loss computes in fp32: compare with central differences at a step that fp32 can bear
    loss = ctc_loss(x, ['AB', 'CC'], abc); loss.backward()
    for i in ((0, 0, 0), (0, 2, 1), (1, 3, 3)):
        with torch.no_grad():
            e = torch.zeros_like(x); e[i] = 1e-2
            slope = (ctc_loss(x + e, ['AB', 'CC'], abc) - ctc_loss(x - e, ['AB', 'CC'], abc))/2e-2
        assert x.grad[i].item() == pytest.approx(slope.item(), abs=1e-3)

def test_ctc_is_fp32_whatever_comes_in():
    x = randn(2, 16, 37)
    loss = ctc_loss(x.bfloat16(), ['ABC1D23']*2, CS)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(ctc_loss(x, ['ABC1D23']*2, CS).item(), rel=1e-2)

def test_ctc_counts_the_last_step_that_suffices():
    assert ctc_loss(torch.zeros(1, 12, 37), ['AAA1111'], CS).isfinite()
    with pytest.raises(KdocrError, match="'AAA1111' needs 12 CTC steps, the model has 11"): ctc_loss(torch.zeros(1, 11, 37), ['AAA1111'], CS)

def test_ctc_faults():
    with pytest.raises(KdocrError, match='36 classes, the charset 37'): ctc_loss(torch.zeros(1, 16, 36), ['A'], CS)
    with pytest.raises(KdocrError, match='2 rows of logits for 1 texts'): ctc_loss(torch.zeros(2, 16, 37), ['A'], CS)
    with pytest.raises(KdocrError, match="track_7: 'aBC'.*'a' is not in the charset"): check_spellable(['track_1', 'track_7'], ['ABC', 'aBC'], CS, 16)

def test_ctc_ignores_a_constant_added_to_the_logits():
    x = randn(2, 16, 37)
    torch.testing.assert_close(ctc_loss(x + 5, ['ABC1D23']*2, CS), ctc_loss(x, ['ABC1D23']*2, CS))

@pytest.mark.parametrize('path,text', [('ABC', 'ABC'), ('AABBCC', 'ABC'), ('A-A-A', 'AAA'), ('---', ''), ('-A--', 'A'), ('AA-AAB', 'AAB'), ('0-01', '001')])
def test_greedy(path, text): assert greedy_read(say(path), CS)[0].text == text

def test_greedy_confidence():
    logits = torch.stack([say('A')[0, 0], say('A', sure=3.)[0, 0], say('-')[0, 0], say('B', sure=4.)[0, 0]])[None]
    p = lambda z: math.exp(z)/(math.exp(z) + 36)
    r = greedy_read(logits, CS)[0]
    assert r.text == 'AB' and r.char_confidence == pytest.approx((p(6), p(4))) and r.confidence == pytest.approx((p(6) + p(4))/2)
    assert greedy_read(say('--'), CS) == [_CtcReading('', 0., ())]

def test_greedy_undoes_what_ctc_teaches():
    x = randn(2, 16, 37).requires_grad_()
    opt = torch.optim.Adam([x], .3)
    for _ in range(80): opt.zero_grad(); ctc_loss(x, ['ABC1D23', 'AAB1122'], CS).backward(); opt.step()
    assert [r.text for r in greedy_read(x, CS)] == ['ABC1D23', 'AAB1122']

# ---- distillation

def test_golden_terms():
    s = TapOut(torch.full((2, 16, 37), 1.), {'backbone_out': torch.full((2, 16, 8), 3.), 'transformer_out': torch.zeros(2, 16, 8)})
    t = TapOut(torch.zeros(2, 16, 37), {'backbone_out': torch.full((2, 16, 8), 1.), 'transformer_out': torch.full((2, 16, 8), .5)})
    kd = distill_losses(s, t, TAPS)
    assert {k: v.item() for k, v in kd.items()} == {'kd_backbone_out': 4., 'kd_transformer_out': .25, 'kd_logits': 1.}
    assert total_loss(torch.tensor(2.), kd, .5).item() == 2 + .5*5.25

def test_no_taps_is_the_control():
    assert distill_losses(out(), out(seed=1), ()) == {}
    assert total_loss(torch.tensor(2.), {}, 1.).item() == 2.

def test_gradients():
    s, t = randn(2, 3, 4, dtype=torch.float64).requires_grad_(), randn(2, 3, 4, seed=1, dtype=torch.float64)
    tap_mse(s, t).backward()
    torch.testing.assert_close(s.grad, 2*(s.detach() - t)/s.numel(), rtol=1e-5, atol=1e-7)
    x = randn(1, 5, 2, dtype=torch.float64).requires_grad_()
    for steps in (3, 5, 9): assert torch.autograd.gradcheck(lambda x: align_steps(x, steps), x)

def test_nothing_reaches_the_teacher():
    s, t = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1).requires_grad_()
    tap_mse(s, t).backward()
    assert s.grad is not None and t.grad is None

def test_half_precision_does_not_overflow():
    s, t = torch.full((1, 2, 3), 300., dtype=torch.float16), torch.zeros(1, 2, 3, dtype=torch.float16)
    loss = tap_mse(s, t)
    assert loss.dtype == torch.float32 and loss.item() == 90_000

def test_align_steps():
    x = torch.arange(6.)[None, :, None]
    assert align_steps(x, 6) is x
    assert align_steps(x, 3).flatten().tolist() == [.5, 2.5, 4.5]
    for steps in (2, 4, 12): torch.testing.assert_close(align_steps(x, steps).mean(), x.mean())

def test_projections_bridge_widths_and_lengths():
    s, t = out(t=32, d=24), out(d=48, seed=1)
    project = Projections(s, t, TAPS)
    assert {k: tuple(m.weight.shape) for k, m in project.maps.items()} == {'backbone_out': (48, 24), 'transformer_out': (48, 24)}
    kd = distill_losses(s, t, TAPS, project)
    sum(kd.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in project.parameters())
    assert list(Projections(s, s, TAPS).parameters()) == []

def test_refusals_name_the_tap():
    s, t = out(), out(seed=1)
    with pytest.raises(KdocrError, match="'transformer_out'.*student 96 and teacher 48; pass Projections"): distill_losses(s, out(d=48), ['transformer_out'])
    with pytest.raises(KdocrError, match="'logits'.*their charsets differ"): distill_losses(s, out(c=11), TAPS[::-1])
    with pytest.raises(KdocrError, match="'backbone_out': 2 tracks of the student, 3 of the teacher"): distill_losses(s, out(b=3), TAPS)
    with pytest.raises(KdocrError, match="no tap 'logit'.*'logits'"): distill_losses(s, t, ['logit'])

# ---- alignment

def test_cka_against_the_matrices():
    x, y = randn(30, 7, dtype=torch.float64), randn(30, 5, seed=1, dtype=torch.float64)
    y = y + x[:, :5]
    def hsic(a, b):
        n, K, L = len(a), a @ a.T, b @ b.T
        K.fill_diagonal_(0); L.fill_diagonal_(0)
        return (K @ L).trace() + K.sum()*L.sum()/((n - 1)*(n - 2)) - 2/(n - 2)*(K @ L).sum()
    assert linear_cka(x + 100, y) == pytest.approx((hsic(x, y)/(hsic(x, x)*hsic(y, y)).sqrt()).item(), abs=1e-9)

def test_cka_known_answers():
    x, Q = randn(100, 20), torch.linalg.qr(randn(20, 20, seed=3))[0]
    assert linear_cka(x, x) == pytest.approx(1) and linear_cka(-2*x @ Q + 5, x) == pytest.approx(1, abs=1e-5)
    none = [linear_cka(randn(20, 100, seed=2*i), randn(20, 100, seed=2*i + 1)) for i in range(200)]
    assert abs(sum(none)/200) < .01 # unbiased: the mean over unrelated pairs is 0
    assert linear_cka(x.view(10, 10, 20), x.view(10, 10, 20)) == pytest.approx(1)

def test_cka_faults():
    with pytest.raises(KdocrError, match='9 rows against 8'): linear_cka(randn(9, 2), randn(8, 2))
    with pytest.raises(KdocrError, match='does not vary'): linear_cka(torch.ones(9, 2), randn(9, 2))
    with pytest.raises(KdocrError, match='needs 4'): linear_cka(randn(3, 2), randn(3, 2))

def test_cosine_and_relative_mse():
    t = randn(4, 16, 8)
    torch.testing.assert_close(cosine_by_position(-3*t, t), -torch.ones(4, 16))
    assert relative_mse(t, t) == 0 and relative_mse(t.mean((0, 1)).expand_as(t), t) == pytest.approx(1)
    with pytest.raises(KdocrError, match='Projections'): relative_mse(t[..., :4], t)
    with pytest.raises(KdocrError, match='does not vary'): relative_mse(torch.ones(2, 3, 4), torch.ones(2, 3, 4))

def test_pca_is_the_teachers():
    t = randn(8, 16, 12) * torch.linspace(1, .1, 12)
    paint = pca_rgb(t)
    rgb = paint(t)
    assert rgb.shape == (8, 16, 3) and rgb.min() == 0 and rgb.max() == 1
    torch.testing.assert_close(paint.directions.T @ paint.directions, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(pca_rgb(t.clone()).directions, paint.directions)
    with pytest.raises(KdocrError, match='width 12, not 5'): paint(randn(1, 2, 5))

def test_frame_agreement():
    a = frame_agreement(say('-A-B'), say('A--B'))
    assert a == {'frames': .5, 'character_frames': pytest.approx(1/3), 'student_blank': .5, 'teacher_blank': .5}
    assert frame_agreement(say('--'), say('--'))['character_frames'] is None
    with pytest.raises(KdocrError, match='4 steps'): frame_agreement(say('-A-B'), say('-A'))

def test_spikes():
    ids, probs = spikes(say('-A'))
    assert ids.tolist() == [[0, CS.encode('A')[0]]] and probs[0, 0].item() == pytest.approx(math.exp(6)/(math.exp(6) + 36))
