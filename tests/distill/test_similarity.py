"""Measures with known answers: where two networks part, what is dead, how sure a step is."""
import math
import pytest
import torch
from kdocr.core import KdocrError
from kdocr.distill.similarity import (attention_map, channel_norms, cka_matrix, cosine_by_position, dead_channels,
                                      entropy, error_by_position, linear_cka, relative_mse)


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mean_error_by_position_is_the_relative_mse():
    s, t = randn(7, 5, 11), randn(7, 5, 11, seed=1)
    assert error_by_position(s, t).shape == (7, 5)
    assert error_by_position(s, t).mean().item() == pytest.approx(relative_mse(s, t), rel=1e-5)
    assert error_by_position(t, t).abs().max() == 0

def test_an_error_stays_where_it_was_made():
    t = randn(4, 6, 8)
    s = t.clone()
    s[2, 3] += 1
    e = error_by_position(s, t)
    assert e.nonzero().tolist() == [[2, 3]]
    assert e[2, 3].item() == pytest.approx(8/(t - t.flatten(0, 1).mean(0)).square().sum(-1).mean().item(), rel=1e-4)

def test_bad_shapes_are_named():
    with pytest.raises(KdocrError, match='align_steps'): error_by_position(randn(2, 3, 4), randn(2, 4, 4))
    with pytest.raises(KdocrError, match='does not vary'): error_by_position(randn(2, 3, 4), torch.ones(2, 3, 4))
    with pytest.raises(KdocrError, match='expected'): attention_map(randn(3, 4))
    with pytest.raises(KdocrError, match='rows'): cka_matrix({'a': randn(9, 2)}, {'a': randn(8, 2)})
    with pytest.raises(KdocrError, match='needs 4'): cka_matrix({'a': randn(3, 2)}, {'a': randn(3, 2)})

@pytest.mark.parametrize('shape, over', [((3, 5, 2, 4), 1), ((3, 6, 5), -1)])
def test_attention_maps_forget_size_and_sign(shape, over):
    x = randn(*shape)
    m = attention_map(x)
    assert torch.allclose(m, attention_map(-3*x), atol=1e-6) and torch.allclose(m.flatten(1).norm(dim=1), torch.ones(3))
    raw = x.square().sum(over)
    assert torch.allclose(m[0]/m[0].max(), raw[0]/raw[0].max(), atol=1e-6)

def test_norms_and_the_dead():
    x = torch.tensor([[3., 0, 5], [-4, 0, 5], [0, 0, 5], [0, 0, 5]])
    assert channel_norms(x).tolist() == [2.5, 0, 5]
    assert dead_channels(x).tolist() == [False, True, True]
    assert dead_channels(1e-8*x).tolist() == [False, True, True] # a matter of proportion
    assert dead_channels(x.view(2, 2, 3)).tolist() == [False, True, True]

def test_all_pairs_are_the_pairs():
    t, s = {'a': randn(3, 9, 4), 'b': randn(27, 6, seed=1)}, {'x': randn(27, 5, seed=2), 'y': randn(3, 9, 4)}
    m = cka_matrix(t, s)
    for i, a in enumerate(t.values()):
        for j, b in enumerate(s.values()): assert m[i, j].item() == pytest.approx(linear_cka(a, b), abs=1e-6)
    assert m[0, 1].item() == pytest.approx(1, abs=1e-6)
    assert cka_matrix(t, {'still': torch.ones(27, 2)}).isnan().all()

@pytest.mark.parametrize('p', [(.5, .5), (.25, .25, .5), (.9, .05, .05)])
def test_entropy_is_shannons(p):
    logits = torch.tensor(p).log().view(1, 1, -1) + 7 # a constant does not count
    assert entropy(logits).item() == pytest.approx(-sum(x*math.log(x) for x in p), rel=1e-5)

def test_entropy_of_certainty_is_no_nan():
    assert entropy(torch.tensor([[[1e4, -1e4, -1e4]]])).item() == 0

def test_cosine_forgets_length():
    t = randn(2, 3, 4)
    assert torch.allclose(cosine_by_position(5*t, t), torch.ones(2, 3))
