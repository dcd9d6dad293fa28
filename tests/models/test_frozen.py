"A frozen copy says what the model says and stays out of reach; compiling and memory change no number."
import copy, subprocess, sys
import pytest, torch
from torch import nn
from kdocr.models import frozen as fast
from kdocr.core import KdocrError
from kdocr.models.frozen import FrozenTeacher, compile_taps, fold_batchnorm, frozen_teacher, has_fast_bf16, keep_memory
from kdocr.models.restran import make_model
from kdocr.models.taps import HookTaps, TapOut

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

def used(model):
    "As after training: statistics, scales and shifts that are not those of a fresh network."
    for m in model.modules():
        if isinstance(m, NORMS):
            nn.init.uniform_(m.running_mean, -.5, .5); nn.init.uniform_(m.running_var, .5, 2)
            nn.init.uniform_(m.weight, .5, 1.5); nn.init.uniform_(m.bias, -.5, .5)
    return model.eval()

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

@pytest.fixture
def tiny(): return used(make_model('restran_tiny'))

def images(b=2, f=2): return torch.rand(b, f, 3, 32, 128) * 2 - 1

def tensors(out): return {'logits': out.logits, **out.taps}

def apart(a, b): # the largest relative distance, ||a - b|| / ||b||, over logits and taps
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in b)

def same(a, b): return all(torch.equal(v, tensors(b)[k]) for k, v in tensors(a).items())

def state(m): return {k: v.clone() for k, v in m.state_dict().items()}

# ---- what it says

# bf16 has 8 bits: 2**-8 = 0.004 a rounding; 0.02 leaves room for the depth of `restran`
@pytest.mark.parametrize('precision, tolerance', [('fp32', 1e-5), ('bf16', 2e-2), ('fp16', 3e-3)])
@pytest.mark.parametrize('name', ['restran_tiny', 'restran_small', 'restran', 'restran_31m'])
def test_it_says_what_the_model_says(name, precision, tolerance):
    model, x = used(make_model(name)), images(1)
    with torch.no_grad(): live = model.forward_taps(x)
    before, kept = state(model), x.clone()
    guest = frozen_teacher(model, precision)
    said, again = guest.forward_taps(x), guest(x)
    assert apart(said, live) < tolerance
    assert same(said, again) and torch.equal(x, kept)
    assert all(v.dtype == torch.float32 and not v.requires_grad and v.shape == tensors(live)[k].shape for k, v in tensors(said).items())
    with torch.no_grad(): assert same(model.forward_taps(x), live)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.requires_grad for p in model.parameters())

def test_no_norm_is_left(tiny):
    assert sum(isinstance(m, NORMS) for m in tiny.modules()) == 11
    assert not any(isinstance(m, NORMS) for m in fold_batchnorm(tiny).modules())

def test_its_precision_is_its_own(tiny):
    x, fp32, bf16 = images(), frozen_teacher(tiny), frozen_teacher(tiny, 'bf16')
    a, b = fp32.forward_taps(x), bf16.forward_taps(x)
    with torch.autocast('cpu', torch.bfloat16): assert same(fp32.forward_taps(x), a) and same(bf16.forward_taps(x), b)
    assert 0 < apart(b, a) < 2e-2

def test_later_training_of_the_model_does_not_reach_it(tiny):
    x, guest = images(), frozen_teacher(tiny)
    first = guest.forward_taps(x)
    with torch.no_grad():
        for p in tiny.parameters(): p.add_(1.)
    assert same(guest.forward_taps(x), first)

def test_its_taps_are_constants_in_a_loss(tiny):
    guest, student, x = frozen_teacher(tiny, 'bf16'), make_model('restran_tiny').train(), images()
    s, t = student.forward_taps(x), guest.forward_taps(x)
    sum((s.taps[k] - t.taps[k]).square().mean() for k in t.taps).backward()
    assert student.backbone.stem[0][0].weight.grad.abs().sum() > 0

# ---- a guest

def test_no_train_mode_and_no_weights(tiny):
    class Host(nn.Module):
        def __init__(self): super().__init__(); self.layer, self.guest = nn.Linear(2, 2), frozen_teacher(used(make_model('restran_31m')))
    host, x = Host(), images(1) # restran_31m has dropout
    first = host.guest.forward_taps(x)
    host.train(); host.requires_grad_(True)
    for m in host.modules(): m.train()
    assert same(host.guest.forward_taps(x), first) and not host.guest.training
    assert [k for k, _ in host.named_parameters()] == list(host.state_dict()) == ['layer.weight', 'layer.bias']
    assert host.guest.eval() is host.guest and host.guest.to('cpu') is host.guest

def test_its_device_can_change_and_its_precision_cannot(tiny):
    guest, x = frozen_teacher(tiny), images()
    with pytest.raises(TypeError): guest.to(torch.bfloat16)
    guest.half(); assert same(guest.forward_taps(x), frozen_teacher(tiny).forward_taps(x))
    assert same(copy.deepcopy(guest).forward_taps(x), guest.forward_taps(x))

def test_faults_are_named(tiny):
    with pytest.raises(KdocrError, match="precision 'bf15'.*did you mean 'bf16'"): frozen_teacher(tiny, 'bf15')
    with pytest.raises(KdocrError, match='Linear has no forward_taps'): frozen_teacher(nn.Linear(2, 2))

# ---- foreign models

class Foreign(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x.flatten(0, 1)).mean(2).transpose(1, 2)
    def forward_taps(self, x): return HookTaps(self, {'first': 'net.0'})(x) if isinstance(self.net, nn.Sequential) else TapOut(self(x), {})

def same_as_live(net, folds):
    model, x = Foreign(used(net)), torch.rand(2, 1, 3, 8, 16)
    norms = sum(isinstance(m, NORMS) for m in model.modules())
    with torch.no_grad(): assert apart(frozen_teacher(model).forward_taps(x), model.forward_taps(x)) < 1e-5
    assert sum(isinstance(m, NORMS) for m in fold_batchnorm(model).modules()) == norms - folds

def test_without_a_batchnorm(): same_as_live(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Dropout(.5)), 0)

def test_a_norm_without_a_convolution(): same_as_live(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), 0)

def test_norms_behind_grouped_and_biased_convolutions():
    same_as_live(nn.Sequential(nn.Identity(), nn.Conv2d(3, 6, 3, groups=3, stride=2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)), 2)

def test_a_convolution_in_two_places_is_not_folded():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    same_as_live(nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), conv), 0)

def test_a_norm_in_two_places_is_not_folded():
    norm = nn.BatchNorm2d(3)
    same_as_live(nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 1), norm, nn.ReLU(), norm), 0)

def test_a_convolution_that_is_more_than_its_weight_is_not_folded():
    same_as_live(nn.Sequential(nn.Identity(), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)), 0)
    watched = nn.Conv2d(3, 4, 1)
    watched.register_forward_hook(lambda m, a, y: 2 * y)
    same_as_live(nn.Sequential(nn.Identity(), watched, nn.BatchNorm2d(4)), 0)

def test_statistics_of_the_batch_are_not_folded():
    class Batch(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
        def forward_taps(self, x): return TapOut(self.net(x[:, 0]).mean(2).transpose(1, 2), {})
    model, x = Batch().eval(), torch.rand(4, 1, 3, 8, 16)
    with torch.no_grad(): assert apart(frozen_teacher(model).forward_taps(x), model.forward_taps(x)) < 1e-5

# ---- bf16

def test_bf16_where_the_processor_has_it(monkeypatch):
    def cpu(**can): monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: can, raising=False); return has_fast_bf16('cpu')
    assert not cpu(avx2=True, avx512_bf16=False) and cpu(avx512_bf16=True) and cpu(amx_bf16=True) and cpu(bf16=True)
    monkeypatch.delattr(torch.cpu, 'get_capabilities')
    assert not has_fast_bf16('cpu')

def test_bf16_on_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: asked.append(including_emulation) or True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert has_fast_bf16('cuda') and has_fast_bf16(torch.device('cuda', 0)) and asked == [False, False]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert not has_fast_bf16('cuda') and not has_fast_bf16('meta')

# ---- compiling

@pytest.mark.slow
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compiled_in_place(tiny, backend):
    torch._dynamo.reset()
    x, plain, guest = images(), copy.deepcopy(tiny), frozen_teacher(tiny)
    assert compile_taps(tiny, 'on', backend=backend) is tiny
    assert list(tiny.state_dict()) == list(plain.state_dict()) and not any('_orig_mod' in k for k in tiny.state_dict())
    plain.load_state_dict(tiny.state_dict(), strict=True)
    with torch.no_grad(): torch.testing.assert_close(tensors(tiny.forward_taps(x)), tensors(plain.forward_taps(x)), rtol=0, atol=1e-6)
    torch.testing.assert_close(tensors(compile_taps(guest, 'on', backend=backend).forward_taps(x)), tensors(plain.forward_taps(x)), rtol=1e-4, atol=1e-4)
    for m in (tiny, plain):
        m.train(); m.zero_grad(); m.forward_taps(x).logits.square().mean().backward()
    for (k, a), (_, b) in zip(tiny.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=k)

def test_a_copy_of_a_compiled_model_is_the_copys_own(tiny):
    x, first = images(), frozen_teacher(tiny).forward_taps(images())
    compile_taps(tiny, 'on', backend='eager')
    twin = copy.deepcopy(tiny)
    assert twin.forward_taps.__self__ is twin and tiny.forward_taps.__self__ is tiny
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
        assert not torch.equal(twin.forward_taps(x).logits, tiny.forward_taps(x).logits)
    assert first.logits.isfinite().all() and apart(frozen_teacher(tiny).forward_taps(x), tiny.forward_taps(x)) < 1e-5

def test_auto_compiles_on_cuda_alone(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, 'compile', lambda f, backend: asked.append((f, backend)) or f)
    for how, device in (('auto', 'cpu'), ('off', 'cpu'), ('off', 'cuda')): assert 'forward_taps' not in vars(compile_taps(tiny, how, device))
    compile_taps(compile_taps(tiny, 'auto', torch.device('cuda')), 'on')
    assert asked == [(type(tiny).forward_taps, 'inductor')] # once
    with pytest.raises(KdocrError, match="compile 'of'.*did you mean 'off'"): compile_taps(tiny, 'of')

# ---- memory

KEEP = '''
import resource, sys, torch
from kdocr.models.frozen import keep_memory
if sys.argv[1] == 'keep' and not keep_memory(): sys.exit(3)
def use():
    many = [torch.ones(10_000_000) for _ in range(6)] # 240 MB; 40 a tensor, above the 32 from which glibc always hands back
    return sum(t[0] for t in many)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use(); use()
start = faults(); use(); use(); print(faults() - start)
'''

def test_memory_is_kept():
    def faults(how): return subprocess.run([sys.executable, '-c', KEEP, how], capture_output=True, text=True)
    kept, freed = faults('keep'), faults('')
    if kept.returncode == 3: pytest.skip('a C library without mallopt')
    assert int(kept.stdout) < int(freed.stdout) / 10, (kept, freed)

def test_no_switch_is_no_error(monkeypatch):
    monkeypatch.setattr(fast.ctypes, 'CDLL', lambda name: object())
    assert keep_memory() is False
