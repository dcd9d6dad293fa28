"""A frozen teacher costs less and says the same; the model that it was made of stays as it was."""
import pytest
import torch
from torch import nn

from kdocr.frozen import Frozen, fold
from kdocr.restran import make_model
from kdocr.run import state_hash
from kdocr.taps import TapOut


def trained(name):
    "A model whose BatchNorm statistics are not those of a fresh one."
    torch.manual_seed(0)
    model = make_model(name)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -.5, .5); nn.init.uniform_(m.running_var, .5, 2); nn.init.uniform_(m.weight, .5, 1.5); nn.init.uniform_(m.bias, -.5, .5)
    return model.eval()


def apart(a, b): return {k: ((x - y).norm() / y.norm()).item() for k, x, y in (('logits', a.logits, b.logits), *((k, a.taps[k], b.taps[k]) for k in b.taps))}


@pytest.mark.parametrize('name', ['restran_tiny', 'restran_stn'])
@pytest.mark.parametrize('precision, tolerance', [('fp32', 1e-5), ('bf16', .05)])
def test_it_says_what_the_model_says(name, precision, tolerance):
    model, x = trained(name), torch.rand(2, 3, 3, 32, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad(): live = model.forward_taps(x)
    before, keep = state_hash(model), x.clone()
    frozen = Frozen(model, precision)
    said, again = frozen.forward_taps(x), frozen.forward_taps(x)
    assert max(apart(said, live).values()) < tolerance
    assert torch.equal(said.logits, again.logits) and torch.equal(x, keep) and said.logits.dtype == torch.float32
    assert state_hash(model) == before, 'bit for bit'
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fold(model).modules())


def test_nobody_finds_it_among_the_modules_and_train_mode_does_not_reach_it():
    model = trained('restran_tiny')
    class Holder(nn.Module):
        def __init__(self): super().__init__(); self.guest = Frozen(model)
    holder, x = Holder(), torch.rand(2, 1, 3, 32, 128)
    first = holder.guest.forward_taps(x).logits
    holder.train(); model.train()
    assert not list(holder.parameters()) and not holder.state_dict()
    assert torch.equal(holder.guest.forward_taps(x).logits, first) and not first.requires_grad


def test_a_network_without_batchnorm_is_frozen_too():
    class Foreign(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(.5))
        def forward_taps(self, x): return TapOut(self.net(x[:, 0]).mean(2).transpose(1, 2), {})
    model, x = Foreign(), torch.rand(2, 1, 3, 32, 128)
    assert torch.allclose(Frozen(model).forward_taps(x).logits, model.eval().forward_taps(x).logits, atol=1e-6)
