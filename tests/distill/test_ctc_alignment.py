"The CTC lattice: every path listed by hand, torch's loss and its gradient, extremes, refusals."
import itertools
import math
import pytest, torch
from torch.nn import functional as F
from kdocr.charset import Charset, min_steps
from kdocr.core import KdocrError
from kdocr.distill.ctc import CharAlignment, log_likelihood, char_posteriors, posterior, gather_chars

CS, AB = Charset(), Charset('AB')
TEXTS = ['ABC1D23', 'AAB1122', 'AAA1111', 'A', '', 'ZZ', 'XY9']

def randn(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def nll(logits, texts, cs=CS): # torch's, one a text
    targets = torch.tensor(sum(map(cs.encode, texts), []), dtype=torch.long)
    return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), targets, torch.tensor([logits.shape[1]]*len(texts)),
                      torch.tensor([len(x) for x in texts]), reduction='none')

def listed(logits, text, cs=AB):
    "Probability of `text`, and of each character at each step given it, over all c**t paths."
    probs, when, total = logits.double().softmax(-1).tolist(), torch.zeros(len(text), len(logits), dtype=torch.float64), 0.
    for path in itertools.product(range(len(cs)), repeat=len(probs)):
        runs = [(k, [t for t, _ in g]) for k, g in itertools.groupby(enumerate(path), key=lambda x: x[1]) if k != cs.blank]
        if cs.decode(k for k, _ in runs) != text: continue
        p = math.prod(probs[t][k] for t, k in enumerate(path))
        total += p
        for i, (_, steps) in enumerate(runs): when[i, steps] += p
    return total, when/total

def by_class(logits, texts, cs=CS): # (b,t,c) what the paths want of each class
    share = posterior(logits, texts, cs)
    out = torch.zeros(logits.shape, dtype=torch.float64)
    for i, text in enumerate(texts):
        for k, c in enumerate(cs.encode(text)): out[i, :, c] += share[i, k]
    out[..., cs.blank] = 1 - out[..., 1:].sum(-1)
    return out

@pytest.mark.parametrize('steps', [1, 2, 3, 5])
@pytest.mark.parametrize('scale', [1., 6.])
def test_every_path_by_hand(steps, scale):
    texts = [''.join(x) for n in (1, 2, 3) for x in itertools.product('AB', repeat=n) if min_steps(''.join(x)) <= steps]
    logits = scale*randn(1, steps, 3, seed=steps).expand(len(texts), -1, -1)
    p, when = log_likelihood(logits, texts, AB).exp(), posterior(logits, texts, AB) # together: padded tables
    for i, text in enumerate(texts):
        total, hand = listed(logits[i], text)
        assert p[i].item() == pytest.approx(total, rel=1e-9)
        torch.testing.assert_close(when[i, :len(text)], hand, rtol=1e-9, atol=1e-12)
        assert (when[i, len(text):] == 0).all()

def test_probabilities_of_all_texts_sum_to_one():
    texts = [''.join(x) for n in range(5) for x in itertools.product('AB', repeat=n) if min_steps(''.join(x)) <= 4]
    assert log_likelihood(2*randn(1, 4, 3).expand(len(texts), -1, -1), texts, AB).exp().sum().item() == pytest.approx(1, rel=1e-9)

@pytest.mark.parametrize('scale', [0., 1., 10., 50.])
def test_likelihood_is_torchs(scale):
    logits = scale*randn(len(TEXTS), 16, 37, dtype=torch.float64)
    torch.testing.assert_close(log_likelihood(logits, TEXTS, CS), -nll(logits, TEXTS), rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('scale', [0., 1., 10., 50.])
def test_gradient_of_ctc_is_softmax_minus_occupancy(scale):
    z = (scale*randn(len(TEXTS), 16, 37, seed=3, dtype=torch.float64)).requires_grad_()
    nll(z, TEXTS).sum().backward()
    torch.testing.assert_close(z.grad, z.detach().softmax(-1) - by_class(z.detach(), TEXTS), rtol=1e-7, atol=1e-9)

def test_counts_paths():
    got = (log_likelihood(torch.zeros(3, 16, 37), ['ABC1D23', 'AAA1111', ''], CS) + 16*math.log(37)).exp()
    assert got.tolist() == pytest.approx([math.comb(23, 14), math.comb(18, 14), 1], rel=1e-9)

@pytest.mark.parametrize('text', ['ABC1D23', 'AAA1111', 'AAAAAAA', 'A'])
def test_the_least_steps_leave_one_path(text):
    logits = 50*randn(1, min_steps(text), 37).sign() # sure of something else
    where = char_posteriors(logits, [text], CS).where[0]
    at = [i + sum(a == b for a, b in zip(text[:i], text[1:i + 1])) for i in range(len(text))]
    assert torch.equal(where, F.one_hot(torch.tensor(at), min_steps(text)).float())

@pytest.mark.parametrize('scale', [50., 1000.])
def test_confident_networks_stay_finite(scale):
    logits = scale*randn(len(TEXTS), 16, 37, seed=1).sign()
    chars = char_posteriors(logits, TEXTS, CS)
    assert chars.where.isfinite().all() and log_likelihood(logits, TEXTS, CS).isfinite().all()
    torch.testing.assert_close(chars.where.sum(-1), chars.mask.float())

def test_classes_that_a_model_rules_out():
    logits = randn(1, 6, 4); logits[..., 3] = -torch.inf # never C
    where = char_posteriors(logits, ['AB'], Charset('ABC')).where
    torch.testing.assert_close(where, char_posteriors(logits[..., :3], ['AB'], AB).where)
    assert log_likelihood(logits, ['AC'], Charset('ABC')).item() == -math.inf

def test_occupancy():
    logits, texts = 3*randn(len(TEXTS), 16, 37), [*TEXTS[:4], None, *TEXTS[5:]]
    chars = char_posteriors(logits, texts, CS)
    assert isinstance(chars, CharAlignment) and chars.ids.dtype == torch.long and chars.mask.dtype == torch.bool and chars.where.dtype == torch.float32
    assert chars.ids.shape == chars.mask.shape == (7, 7) and chars.where.shape == (7, 7, 16)
    assert [[CS.chars[i - 1] for i in row if i] for row in chars.ids.tolist()] == [list(x or '') for x in texts]
    torch.testing.assert_close(chars.where.sum(-1), chars.mask.float())
    when = posterior(logits, texts, CS)
    assert (when.sum(-1)[chars.mask] >= 1 - 1e-9).all() # each character lasts a step at least
    torch.testing.assert_close(chars.where[chars.mask], (when/when.sum(-1, keepdim=True))[chars.mask].float())
    alone = char_posteriors(logits[2:3], TEXTS[2:3], CS) # no neighbour in the batch matters
    torch.testing.assert_close(chars.where[2:3], alone.where)

def test_occupancy_follows_a_shift():
    logits = 3*randn(1, 16, 37); logits[:, -3:, 1:] -= 20; logits[:, :1, 1:] -= 20 # silence at both ends
    where, later = (char_posteriors(x, ['ABC1D23'], CS).where for x in (logits, logits.roll(1, 1)))
    torch.testing.assert_close(later, where.roll(1, -1), rtol=1e-3, atol=1e-4)

def test_occupancy_reads_backwards_as_forwards():
    logits, text = randn(1, 16, 37), 'AAB1122'
    mirrored = posterior(logits.flip(1), [text[::-1]], CS).flip(1, 2)
    torch.testing.assert_close(posterior(logits, [text], CS), mirrored, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('texts', [['', None], []])
def test_no_characters_at_all(texts):
    chars = char_posteriors(torch.zeros(len(texts), 16, 37), texts, CS)
    assert chars.where.shape == (len(texts), 0, 16) and gather_chars(torch.zeros(len(texts), 16, 5), chars.where).shape == (len(texts), 0, 5)

def test_a_constant_to_autograd():
    z = randn(1, 16, 37).requires_grad_()
    assert not char_posteriors(z, ['A'], CS).where.requires_grad and not posterior(z, ['A'], CS).requires_grad and not log_likelihood(z, ['A'], CS).requires_grad

def test_half_precision_comes_in():
    x = randn(2, 16, 37).bfloat16()
    torch.testing.assert_close(char_posteriors(x, TEXTS[:2], CS).where, char_posteriors(x.float(), TEXTS[:2], CS).where)

def test_spell():
    where = torch.tensor([[[0., 1, 0], [.5, 0, .5], [0, 0, 0]]])
    x = torch.tensor([[[1., 10], [2, 20], [4, 40]]])
    assert gather_chars(x, where).tolist() == [[[2, 20], [2.5, 25], [0, 0]]]
    assert gather_chars(x.bfloat16(), where).dtype == torch.float32 and gather_chars(x.double(), where).dtype == torch.float64
    x = randn(1, 3, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_chars(x, where), x)

def test_faults():
    for f in (char_posteriors, posterior, log_likelihood):
        with pytest.raises(KdocrError, match="'AAA1111' needs 12 CTC steps, the model has 11"): f(torch.zeros(2, 11, 37), ['AB', 'AAA1111'], CS)
        with pytest.raises(KdocrError, match="the character 'a' is not in the charset"): f(torch.zeros(1, 16, 37), ['aB'], CS)
        with pytest.raises(KdocrError, match='36 classes, the charset 37'): f(torch.zeros(1, 16, 36), ['A'], CS)
        with pytest.raises(KdocrError, match='2 rows of logits for 1 texts'): f(torch.zeros(2, 16, 37), ['A'], CS)
    with pytest.raises(KdocrError, match='gather_chars: 8 steps on 1 tracks, but 16 on 1'): gather_chars(torch.zeros(1, 8, 3), torch.zeros(1, 7, 16))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu_it_is_the_same_and_waits_for_nobody():
    logits = randn(len(TEXTS), 16, 37)
    here, there = logits.cuda(), char_posteriors(logits, TEXTS, CS)
    torch.cuda.set_sync_debug_mode('error')
    try: got = char_posteriors(here, TEXTS, CS)
    finally: torch.cuda.set_sync_debug_mode('default')
    torch.testing.assert_close(got.where.cpu(), there.where)
