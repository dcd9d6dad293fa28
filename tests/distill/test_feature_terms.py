"Terms on features: gradients against differences, known answers, what each forgives, what reaches the teacher, refusals."
import inspect, math
from typing import NamedTuple
import pytest, torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from kdocr.distill.similarity import cosine_by_position, linear_cka, relative_mse
from kdocr.core import KdocrError
from kdocr.distill.feature_terms import (FEATURE_TERMS, attention, shift_mse, cka, info_nce, cosine, rkd_distance,
                                         gram, ln_mse, pearson, spp, relative)

class Chars(NamedTuple):
    ids:Tensor
    mask:Tensor
    where:Tensor

def randn(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def rotation(d, dtype=torch.float64): return torch.linalg.qr(randn(d, d, seed=9, dtype=dtype))[0]

def chars(b, t, n=3, seed=5):
    "Characters of three classes with soft shares of steps; the last place of the second track is empty."
    ids = torch.arange(b*n).view(b, n) % 3
    mask = torch.ones(b, n, dtype=torch.bool); mask[1:2, -1] = False
    return Chars(ids, mask, randn(b, n, t, seed=seed).softmax(-1))

def loss(name, s, t, **options):
    extra = (chars(*s.shape[:2]), chars(*s.shape[:2], seed=6)) if name == 'info_nce' else ()
    return FEATURE_TERMS[name](s, t, *extra, **options)

VARIANTS = [(k, {}) for k in FEATURE_TERMS] + [
    ('attention', {'power': 1.}), ('attention', {'power': .5}), ('attention', {'power': 3}), ('spp', {'levels': 1}), ('spp', {'levels': 2, 'finest': False}),
    ('shift_mse', {'reach': 3}), ('rkd_distance', {'over': 'steps'}), ('gram', {'over': 'steps'}), ('info_nce', {'temperature': 1.})]
named = pytest.mark.parametrize('name,options', VARIANTS, ids=lambda v: v if isinstance(v, str) else '-'.join(map(str, v.values())))

def test_the_names():
    assert list(FEATURE_TERMS) == ['relative', 'pearson', 'ln_mse', 'cosine', 'attention', 'spp', 'shift_mse', 'rkd_distance', 'gram', 'info_nce', 'cka']

def test_options_are_keywords_with_plain_defaults():
    for name, f in FEATURE_TERMS.items():
        params = list(inspect.signature(f).parameters.values())
        assert [p.name for p in params[:2]] == ['s', 't'] and all(p.kind == p.KEYWORD_ONLY for p in params[4 if name == 'info_nce' else 2:])
        assert all(type(p.default) in (float, int, str, bool) for p in params if p.kind == p.KEYWORD_ONLY)
    with pytest.raises(TypeError): attention(randn(1, 4, 2), randn(1, 4, 2), 2.)

# ---- for every term

@named
def test_gradient(name, options):
    s, t = randn(3, 5, 4, dtype=torch.float64).requires_grad_(), randn(3, 5, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(name, s, t, **options), s)

@named
def test_nothing_reaches_the_teacher(name, options):
    s, t = randn(3, 8, 6).requires_grad_(), randn(3, 8, 6, seed=1).requires_grad_()
    value = loss(name, s, t, **options); value.backward()
    assert value.shape == () and value > 0 and s.grad.abs().sum() > 0 and t.grad is None

@named
@pytest.mark.parametrize('half', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(name, options, half):
    s, t = randn(3, 8, 6).to(half), randn(3, 8, 6, seed=1).to(half)
    with torch.autocast('cpu', dtype=torch.bfloat16): value = loss(name, s, t, **options)
    assert value.dtype == torch.float32 and value == loss(name, s.float(), t.float(), **options)
    assert loss(name, s.double(), t.double(), **options).dtype == torch.float64

@named
@pytest.mark.parametrize('case', ['equal', 'student zero', 'teacher zero', 'both zero', 'student constant', 'teacher constant', 'one step zero', 'large'])
def test_finite_at_the_edges(name, options, case):
    s, t = randn(3, 8, 6), randn(3, 8, 6, seed=1)
    zero, flat = torch.zeros_like(s), torch.full_like(s, .1)
    s, t = {'equal': (t, t), 'student zero': (zero, t), 'teacher zero': (s, zero), 'both zero': (zero, zero), 'student constant': (flat, t),
            'teacher constant': (s, flat), 'one step zero': (s*(torch.arange(8) != 3)[:, None], t), 'large': (3e4*s, 3e4*t)}[case]
    s = s.clone().requires_grad_()
    value = loss(name, s, t, **options); value.backward()
    assert value.isfinite() and s.grad.isfinite().all()
    if case != 'large': assert s.grad.abs().max() < 1e3
    if case == 'equal' and name not in ('info_nce', 'shift_mse'): assert abs(value) < 1e-5 and s.grad.abs().max() < 1e-3

@named
def test_nothing_is_read_back(name, options):
    "Values that do not exist cannot be asked for: `.item()` and a boolean index would raise."
    with FakeTensorMode(allow_non_fake_inputs=False):
        s, t = torch.empty(3, 8, 6, requires_grad=True), torch.empty(3, 8, 6)
        c = Chars(torch.empty(3, 3, dtype=torch.long), torch.empty(3, 3, dtype=torch.bool), torch.empty(3, 3, 8))
        value = FEATURE_TERMS[name](s, t, *((c, c) if name == 'info_nce' else ()), **options)
        value.backward()
        assert value.shape == () and s.grad.shape == s.shape
        with pytest.raises(Exception): value.item() # what the check rests on

@named
def test_shapes_are_checked(name, options):
    s = randn(3, 8, 6)
    with pytest.raises(KdocrError, match=rf'{name}: student \(3, 8, 6\) and teacher \(3, 8, 5\)'): loss(name, s, s[..., :5], **options)
    with pytest.raises(KdocrError, match=rf'{name}: student \(3, 8, 6\) and teacher \(3, 1, 6\)'): loss(name, s, s[:, :1], **options) # would broadcast

@pytest.mark.parametrize('name', ['rkd_distance', 'gram', 'info_nce', 'cka', 'relative'])
def test_a_batch_of_one_track(name):
    s = randn(1, 8, 6).requires_grad_()
    value = loss(name, s, randn(1, 8, 6, seed=1)); value.backward()
    assert value.isfinite() and s.grad.isfinite().all()

# ---- known answers

def test_relative_is_what_is_measured():
    s, t = randn(4, 8, 6), 3*randn(4, 8, 6, seed=1) + 2
    torch.testing.assert_close(relative(s, t).item(), relative_mse(s, t), rtol=1e-5, atol=0)
    assert relative(t, t) == 0
    torch.testing.assert_close(relative(t.mean((0, 1)).expand_as(t), t), torch.tensor(1.))
    assert relative(s, torch.full_like(s, 2.)) == F.mse_loss(s, torch.full_like(s, 2.))

def test_pearson():
    t = randn(4, 8, 6, dtype=torch.float64)
    size, offset = randn(4, 8, 1, seed=2, dtype=torch.float64).abs() + .1, randn(4, 8, 1, seed=3, dtype=torch.float64)
    assert abs(pearson(size*t + offset, t)) < 1e-9 and abs(pearson(-size*t + offset, t) - 2) < 1e-9
    s = randn(4, 8, 6, seed=1, dtype=torch.float64)
    r = [torch.corrcoef(torch.stack([a, b]))[0, 1].item() for a, b in zip(s.flatten(0, 1), t.flatten(0, 1))]
    assert pearson(s, t).item() == pytest.approx(1 - sum(r)/32)

def test_ln_mse_is_twice_pearson():
    s, t = randn(4, 8, 64, dtype=torch.float64), randn(4, 8, 64, seed=1, dtype=torch.float64)
    assert ln_mse(s, t).item() == pytest.approx(2*pearson(s, t).item(), rel=1e-4)
    assert ln_mse(torch.tensor([[[1., -1]]]), torch.tensor([[[-5., 5]]])).item() == pytest.approx(4, rel=1e-4)

def test_cosine():
    s, t = randn(4, 8, 6), randn(4, 8, 6, seed=1)
    torch.testing.assert_close(cosine(s, t), 1 - cosine_by_position(s, t).mean())
    assert abs(cosine(3*t, t)) < 1e-6 and abs(cosine(-t, t) - 2) < 1e-6 and cosine(t + 5, t) > .1

def test_attention():
    s, t = torch.tensor([[[3., 4], [0, 0]]]), torch.tensor([[[0., 0], [1, 1]]])
    assert attention(s, t).item() == pytest.approx(2) and attention(7*s.flip(-1), s).item() == pytest.approx(0, abs=1e-9)
    a, b = torch.tensor([[[1.], [1]]]), torch.tensor([[[1.], [2]]]) # |x|^p: (1,1) against (1,2^p)
    for p in (1, 2, 3): assert attention(a, b, power=p).item() == pytest.approx(2 - 2*(1 + 2**p)/math.sqrt(2*(1 + 4**p)), rel=1e-5)
    x = randn(2, 6, 5, dtype=torch.float64)
    assert attention(x @ rotation(5), x) < 1e-15 # squares: energy does not know the axes
    assert attention(3e4*randn(2, 6, 5), randn(2, 6, 5, seed=1), power=12).isfinite() # 3e4^12 is beyond fp32

def test_pyramid():
    s, t = randn(4, 7, 6), randn(4, 7, 6, seed=1)
    assert spp(s, t, levels=1) == ln_mse(s, t)
    pool = lambda x, w: torch.stack([x[:, i:i + w].mean(1) for i in range(0, 7, w)], 1) # the last window is shorter
    levels = [ln_mse(pool(s, w), pool(t, w)) for w in (1, 2, 4)]
    torch.testing.assert_close(spp(s, t), sum(levels)/3)
    torch.testing.assert_close(spp(s, t, finest=False), sum(levels[1:])/2)
    x = randn(8, 19, 24).unfold(1, 3, 1).mean(-1) # neighbours alike
    assert spp(x[:, 1:], x[:, :-1], finest=False) < spp(x[:, 1:], x[:, :-1]) < ln_mse(x[:, 1:], x[:, :-1])

def test_best_shift():
    t = randn(6, 8, 5)
    s = torch.cat([t[:2].roll(1, 1), t[2:4], t[4:].roll(-1, 1)]) # each track on its own
    assert shift_mse(s, t) == 0 < shift_mse(t.roll(2, 1), t) and shift_mse(t.roll(2, 1), t, reach=2) == 0
    assert shift_mse(randn(6, 8, 5, seed=1), t) <= ln_mse(randn(6, 8, 5, seed=1), t)

def test_best_shift_teaches_only_the_chosen_shift():
    t = randn(1, 8, 5)
    s = (t.roll(1, 1) + .1*randn(1, 8, 5, seed=1)).requires_grad_() # one late: its first step is compared with nothing
    shift_mse(s, t).backward()
    assert s.grad[:, 0].abs().sum() == 0 and (s.grad[:, 1:].abs().sum(-1) > 0).all()
    late, on_time = s.detach()[:, 1:], t[:, :-1]
    torch.testing.assert_close(shift_mse(s, t), ln_mse(late, on_time))

def test_best_shift_chooses_one_of_two_that_tie():
    p, q = torch.tensor([1., -2, 1]), torch.tensor([1., -2, 2])
    sign = torch.tensor([1., -1, 1, -1])[None, :, None]
    s = (-sign*q).requires_grad_() # one early fits as well as one late
    shift_mse(s, sign*p).backward()
    assert (s.grad.abs().sum(-1) > 0).sum() == 3 and (s.grad[0, 0].any() ^ s.grad[0, -1].any())

def test_distance():
    s, t = randn(5, 3, 4, dtype=torch.float64), randn(5, 3, 4, seed=1, dtype=torch.float64)
    def by_hand(s, t):
        off = ~torch.eye(len(s), dtype=torch.bool)
        s, t = ((d := torch.cdist(x, x))[off]/d[off].mean() for x in (s, t))
        return F.huber_loss(s, t).item()
    assert rkd_distance(s, t).item() == pytest.approx(by_hand(s.flatten(1), t.flatten(1)))
    assert rkd_distance(s, t, over='steps').item() == pytest.approx(sum(map(by_hand, s, t))/5)
    for over in ('tracks', 'steps'): assert rkd_distance(3*t @ rotation(4) + 7, t, over=over) < 1e-15
    assert rkd_distance(t.float() + 1000, t.float()) < 1e-7 # far from the origin fp32 keeps its digits
    twins = torch.cat([t, t]).float().requires_grad_() # pairs at no distance
    rkd_distance(twins, randn(10, 3, 4)).backward()
    assert twins.grad.isfinite().all() and rkd_distance(t[:1], s[:1]) == 0

def test_gram():
    s, t = randn(5, 3, 4, dtype=torch.float64), randn(5, 3, 4, seed=1, dtype=torch.float64)
    def by_hand(s, t):
        s, t = (F.normalize(x @ x.T, dim=1) for x in (s, t))
        return ((s - t).norm()**2/len(s)**2).item()
    assert gram(s, t).item() == pytest.approx(by_hand(s.flatten(1), t.flatten(1)))
    assert gram(s, t, over='steps').item() == pytest.approx(sum(map(by_hand, s, t))/5)
    for over in ('tracks', 'steps'): assert gram(3*t @ rotation(4), t, over=over) < 1e-15 < gram(t + 7, t, over=over)

def test_cka_is_what_is_measured():
    s, t = randn(4, 8, 6, dtype=torch.float64), randn(4, 8, 6, seed=1, dtype=torch.float64)
    s = s + t
    assert cka(s, t).item() == pytest.approx(1 - linear_cka(s, t), abs=1e-9) and cka(s.float(), t.float()).item() == pytest.approx(1 - linear_cka(s, t), abs=1e-5)
    assert abs(cka(-3*t @ rotation(6) + 7, t)) < 1e-9 and cka(t, t).abs() < 1e-6

@pytest.mark.parametrize('flat', [0., .1, 1e4])
def test_cka_of_what_does_not_vary(flat):
    x, t = torch.full((4, 8, 6), flat).requires_grad_(), randn(4, 8, 6)
    value = cka(x, t); value.backward()
    assert value == 1 and not x.grad.any() and cka(t, x.detach()) == 1

# ---- contrast

def say(*classes, mask=None, n_steps=4): # one track, a character a step
    ids = torch.tensor([classes])
    return Chars(ids, torch.ones_like(ids).bool() if mask is None else torch.tensor([mask]), torch.eye(n_steps)[None, :len(classes)])

def test_contrast_by_hand():
    s, t = randn(4, 8, 6, dtype=torch.float64), randn(4, 8, 6, seed=1, dtype=torch.float64)
    a, b = chars(4, 8), chars(4, 8, seed=6)
    u, v = (F.normalize(c.where.double() @ x, dim=-1) for c, x in ((a, s), (b, t)))
    alive = [(i, j) for i in range(4) for j in range(3) if a.mask[i, j]]
    assert len(alive) == 11
    def one(i, j):
        near = {k: (u[i, j] @ v[k]).item()/.1 for k in alive if a.ids[k] != a.ids[i, j] or k == (i, j)}
        return math.log(sum(map(math.exp, near.values()))) - near[i, j]
    assert info_nce(s, t, a, b).item() == pytest.approx(sum(one(*k) for k in alive)/11)

def test_contrast_leaves_the_same_class_alone():
    x = torch.eye(4)[None]
    assert info_nce(x, x, say(1, 1, 1, 1), say(1, 1, 1, 1)) == 0 # no rival at all
    assert info_nce(x, x, say(1, 2), say(1, 2), temperature=1.).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert info_nce(x, x, say(1, 2, 1), say(1, 2, 1), temperature=1.).item() == pytest.approx((2*math.log(1 + math.exp(-1)) + math.log(1 + 2*math.exp(-1)))/3)

def test_contrast_does_not_count_what_is_masked():
    x = torch.eye(4)[None]
    odd = say(1, 2, 3, mask=[True, True, False])
    odd.where[0, 2] = math.nan # an empty place may hold anything
    s = x.clone().requires_grad_()
    value = info_nce(s, x, odd, say(1, 2, 3)); value.backward()
    assert value == info_nce(x, x, say(1, 2), say(1, 2)) and s.grad.isfinite().all() and not s.grad[:, 2].any()

def test_contrast_of_nobody_is_zero_with_a_graph():
    s, none = randn(1, 4, 6).requires_grad_(), say(1, 2, mask=[False, False])
    value = info_nce(s, randn(1, 4, 6, seed=1), none, say(1, 2)); value.backward()
    assert value == 0 and not s.grad.any()

def test_contrast_follows_each_networks_own_alignment():
    t, c = randn(4, 8, 6), chars(4, 8)
    torch.testing.assert_close(info_nce(t.roll(2, 1), t, c._replace(where=c.where.roll(2, -1)), c), info_nce(t, t, c, c))
    assert info_nce(t, t, c, c) < info_nce(t.roll(2, 1), t, c, c)
    where = c.where.clone().requires_grad_()
    info_nce(t.clone().requires_grad_(), randn(4, 8, 6, seed=1), c._replace(where=where), c._replace(where=where)).backward()
    assert where.grad is None # a reading, and not what is to learn

# ---- refusals

@pytest.mark.parametrize('name,options,message', [
    ('attention', {'power': 0}, r'attention: power 0 must be a number above 0'), ('attention', {'power': -1.}, 'power -1.0'),
    ('attention', {'power': math.nan}, 'power nan'), ('attention', {'power': math.inf}, 'power inf'), ('attention', {'power': '2'}, "power '2'"),
    ('spp', {'levels': 0}, r'spp: levels 0 must be a whole number of 1 to 4 \(8 steps'), ('spp', {'levels': 5}, 'levels 5 .* of 1 to 4'),
    ('spp', {'levels': 1, 'finest': False}, r'levels 1 .* of 2 to 4 \(8 steps, finest=False'), ('spp', {'levels': 2.}, r'levels 2\.0'),
    ('shift_mse', {'reach': 0}, r'shift_mse: reach 0 must be a whole number of 1 to 7 \(8 steps\)'), ('shift_mse', {'reach': 8}, 'reach 8'),
    ('shift_mse', {'reach': True}, 'reach True'),
    ('rkd_distance', {'over': 'track'}, "rkd_distance: over 'track': did you mean 'tracks'"), ('gram', {'over': 'batch'}, "gram: over 'batch'; known: tracks, steps"),
    ('info_nce', {'temperature': 0.}, 'info_nce: temperature 0.0 must be a number above 0')])
def test_bad_options(name, options, message):
    with pytest.raises(KdocrError, match=message): loss(name, randn(3, 8, 6), randn(3, 8, 6, seed=1), **options)

def test_levels_and_reach_up_to_the_last_that_fits():
    s, t = randn(3, 8, 6), randn(3, 8, 6, seed=1)
    assert spp(s, t, levels=4).isfinite() and shift_mse(s, t, reach=7).isfinite()

def test_characters_must_fit():
    s, c = randn(3, 8, 6), chars(3, 8)
    with pytest.raises(KdocrError, match=r'info_nce: characters \(b,n,t\) \(3, 3, 9\) of the student and \(3, 3, 8\)'): info_nce(s, s, chars(3, 9), c)
    with pytest.raises(KdocrError, match=r'on taps \(3, 7, 6\)'): info_nce(s[:, :7], s[:, :7], c, c)
    with pytest.raises(KdocrError, match=r'on taps \(2, 8, 6\)'): info_nce(s[:2], s[:2], c, c)

def test_cka_needs_four_steps():
    with pytest.raises(KdocrError, match='cka: 3 steps; the unbiased estimate needs 4'): cka(randn(1, 3, 6), randn(1, 3, 6))
