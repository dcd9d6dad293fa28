"""Ranks: two processes do what one does. torchrun starts this very file for the jobs; pytest runs the same jobs alone and compares."""
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kdocr.charset import Charset
from kdocr.core import KdocrError, guard
from kdocr.distill.ctc import ctc_loss
from kdocr.training.distributed import Place, Ranks, SharedBatchNorm, main_first, join_moments, shared_batchnorm
from kdocr.models.restran import make_model


# ------------------------------------------------------------------ jobs: the same code for one rank and for two

NORMS = { # the layer, and the shape and place of what it sees
    'pictures': (lambda: nn.BatchNorm2d(5), (8, 5, 6, 7), 0.),
    'far from 0': (lambda: nn.BatchNorm2d(5), (8, 5, 6, 7), 1000.),
    'rows': (lambda: nn.BatchNorm1d(5), (8, 5), 3.),
    'no weights': (lambda: nn.BatchNorm2d(5, affine=False), (8, 5, 2, 3), 1.),
    'mean of all batches': (lambda: nn.BatchNorm2d(5, momentum=None), (8, 5, 2, 3), 1.),
    'nothing tracked': (lambda: nn.BatchNorm2d(5, track_running_stats=False), (8, 5, 2, 3), 1.),
}

def norm(ranks, name):
    "Two training passes and one in eval mode: outputs, gradients and running statistics, of the whole batch."
    make, shape, place = NORMS[name]
    torch.manual_seed(0)
    layer = make()
    for p in layer.parameters(): nn.init.uniform_(p, .5, 2.)
    layer, part, out = shared_batchnorm(layer, ranks), ranks.part(shape[0]), {}
    for turn in range(2):
        x, g = place + torch.randn(shape) * torch.arange(1., 9).view(-1, *[1]*(len(shape) - 1)), torch.randn(shape)
        if len(shape) == 4: x = x.to(memory_format=torch.channels_last)
        x = x[part].requires_grad_()
        y = layer(x)
        (y * g[part]).mean().backward()
        ranks.mean_grads(layer.parameters())
        out |= {f'y{turn}': torch.cat(ranks.gather(y.detach())), f'gx{turn}': torch.cat(ranks.gather(x.grad))/ranks.world}
    out |= {f'grad {k}': p.grad for k, p in layer.named_parameters()} | dict(layer.state_dict())
    return out | ({'eval': layer.eval()(place + torch.ones(shape))} if layer.track_running_stats else {})


def grads(ranks):
    "Three parameters: with a gradient everywhere, on the last rank only, nowhere; and what the messages were."
    both, last, nobody = (nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)) for _ in range(3))
    both.grad = (torch.arange(24.).view(2, 3, 2, 2) + ranks.rank).to(memory_format=torch.channels_last)
    if ranks.rank == ranks.world - 1: last.grad = torch.ones_like(last)
    ranks.mean_grads(p for p in (both, last, nobody))
    return dict(both=both.grad, last=last.grad, nobody=nobody.grad, stays_channels_last=both.grad.is_contiguous(memory_format=torch.channels_last))


def means(ranks):
    real, sent = dist.all_reduce, []
    def counted(t, *args): sent.append((t.dtype, t.numel())); return real(t, *args)
    r = float(ranks.rank)
    tensors = [torch.full((3, 2), r).T, torch.tensor(r), torch.full((2,), r, dtype=torch.float64), torch.full((4,), r, dtype=torch.bfloat16), nn.Parameter(torch.tensor([r]))]
    dist.all_reduce = counted
    try: ranks.mean_(tensors)
    finally: dist.all_reduce = real
    return dict(values=[t.detach().float() for t in tensors], sent=sent)


def talk(ranks):
    return dict(one=ranks.any(ranks.rank == ranks.world - 1), none=ranks.any(False), all=ranks.any([1]),
                gathered=ranks.gather({'rank': ranks.rank, 'pad': 'x' * 100 * ranks.rank}), told=ranks.broadcast(f'from {ranks.rank}'), again=Ranks.join('cpu') == ranks)


def order(ranks, path):
    "What each rank finds when its turn comes; then a failure on rank 0, after which all still are in step."
    with main_first(ranks):
        found = path.exists()
        if ranks.leads: time.sleep(.5); path.write_text('packed')
    heard = []
    for fault in OSError('disk full'), KdocrError('/data/plates: no such folder'):
        try:
            with main_first(ranks):
                if ranks.leads: raise fault
                heard.append('a body that should not run')
        except (OSError, KdocrError) as e: heard.append((type(e).__name__, str(e)))
    return dict(found=found, heard=heard, after=ranks.gather('here'))


def small(ranks, shared):
    "Five steps of a small network."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    if shared: net = shared_batchnorm(net, ranks)
    opt, part, losses = torch.optim.SGD(net.parameters(), .1, momentum=.9), ranks.part(12), []
    for _ in range(5):
        x, y = torch.randn(12, 3, 10, 10) * torch.arange(1., 13).view(-1, 1, 1, 1), torch.randn(12, 2)
        loss = (net(x[part]) - y[part]).square().mean()
        loss.backward()
        ranks.mean_grads(net.parameters())
        opt.step(); opt.zero_grad()
        losses.append(loss.detach())
    ranks.mean_(losses)
    return dict(losses=torch.stack(losses), **net.state_dict())


def reader(ranks, kind, order=range(8)):
    "Five steps of the real reader with its real loss, clipping and optimizer; a batch is 8 tracks."
    torch.manual_seed(0)
    charset, order = Charset('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ'), list(order)
    model = shared_batchnorm(make_model('restran_tiny', len(charset)), ranks).train().to(kind)
    params = list(model.parameters())
    opt, part, rows = torch.optim.AdamW(params, 1e-3, weight_decay=1e-4, fused=True), ranks.part(8), []
    all_texts = ['ABC1D23', 'BRA2E19', 'KDO4C26', 'QXR0157', 'JKL7M89', 'IFY3002', 'AAA1111', 'SUN0B77']
    for step in range(5):
        images, texts = torch.randn(8, 1, 3, 32, 128).clamp(-1, 1)[order].to(kind), [all_texts[i] for i in order]
        loss = ctc_loss(model.forward_taps(images[part]).logits, texts[part], charset)
        loss.backward()
        ranks.mean_grads(params)
        if step == 0: grads = {k: p.grad.clone() for k, p in model.named_parameters()}
        norm = nn.utils.clip_grad_norm_(params, 1.)
        opt.step(); opt.zero_grad()
        rows.append(torch.stack((loss.detach().to(kind), norm)))
    ranks.mean_(rows)
    return dict(rows=torch.stack(rows), grads=grads, weights=model.state_dict())


def all_jobs(ranks, out):
    done = {('norm', k): norm(ranks, k) for k in NORMS}
    done |= dict(grads=grads(ranks), means=means(ranks), talk=talk(ranks), order=order(ranks, out/'packed'))
    done |= {('small', s): small(ranks, s) for s in (True, False)} | {('reader', k): reader(ranks, k) for k in (torch.float32, torch.float64)}
    torch.save(done, out/f'{ranks.rank}.pt')


def fails(ranks, out):
    with main_first(ranks):
        if ranks.leads: raise KdocrError('/data/plates: no such folder')


def dies(ranks, out):
    (out/f'pid{ranks.rank}').write_text(str(os.getpid()))
    ranks.wait()
    if ranks.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    ranks.mean_([torch.ones(3)]) # rank 0 waits here for a partner that is no more


def main(job, out):
    torch.set_num_threads(1)
    with Ranks.join('cpu') as ranks: {'all_jobs': all_jobs, 'fails': fails, 'dies': dies}[job](ranks, Path(out))
    (Path(out)/f'threads{ranks.rank}').write_text(' '.join(p.read_text().strip() for p in Path('/proc/self/task').glob('*/comm')))

if __name__ == '__main__': sys.exit(guard(main, *sys.argv[1:]))


# ------------------------------------------------------------------ two ranks against one

def torchrun(job, out, n=2):
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).resolve().parent.parent.parent))
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), __file__, job, str(out)],
                          env=env, capture_output=True, text=True, timeout=300)

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "What each of two ranks came to."
    out = tmp_path_factory.mktemp('ranks')
    done = torchrun('all_jobs', out)
    assert done.returncode == 0, done.stderr
    return [torch.load(out/f'{r}.pt', weights_only=False) for r in range(2)]

def test_nobody_carries_messages_after_leaving(both, tmp_path_factory):
    "A thread of gloo's that outlives the group may abort the process at its very end, one time in thirty on a busy machine."
    threads = [p.read_text() for p in tmp_path_factory.getbasetemp().glob('ranks[0-9]/threads*')]
    assert len(threads) == 2 and not any('gloo' in t for t in threads), threads

def close(a, b, atol=1e-5):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], atol=atol, rtol=1e-5, msg=lambda m: f'{k}: {m}')

def equal(a, b): return all(torch.equal(a[k], b[k]) for k in a.keys() | b.keys())


@pytest.mark.parametrize('name', NORMS)
def test_a_batch_norm_of_two_ranks_is_that_of_the_whole_batch(both, name):
    alone = norm(Ranks(), name)
    close(both[0]['norm', name], alone, atol=2e-4 if name == 'far from 0' else 1e-5) # fp32 itself is 6e-5 coarse at 1000
    assert equal(both[0]['norm', name], both[1]['norm', name])


def test_gradients_are_averaged_and_missing_ones_are_agreed_on(both):
    for g in (b['grads'] for b in both):
        assert torch.equal(g['both'], torch.arange(24.).view(2, 3, 2, 2) + .5) and g['stays_channels_last']
        assert torch.equal(g['last'], torch.full((2, 3, 2, 2), .5)) and g['nobody'] is None


def test_a_mean_takes_one_message_a_type(both):
    for m in (b['means'] for b in both):
        assert all(torch.equal(t, torch.full_like(t, .5)) for t in m['values'])
        assert sorted(m['sent'], key=str) == [(torch.bfloat16, 4), (torch.float32, 8), (torch.float64, 2)]


def test_ranks_agree(both):
    for t in (b['talk'] for b in both):
        assert (t['one'], t['none'], t['all'], t['told'], t['again']) == (True, False, True, 'from 0', True)
        assert t['gathered'] == [{'rank': 0, 'pad': ''}, {'rank': 1, 'pad': 'x' * 100}]


def test_rank_0_goes_first_and_its_failure_reaches_the_others(both):
    lead, other = (b['order'] for b in both)
    assert (lead['found'], other['found']) == (False, True)
    assert lead['heard'] == [('OSError', 'disk full'), ('KdocrError', '/data/plates: no such folder')]
    assert other['heard'] == [('KdocrError', 'rank 0: OSError: disk full'), ('KdocrError', 'rank 0: /data/plates: no such folder')]
    assert lead['after'] == other['after'] == ['here', 'here']


def test_two_ranks_train_a_small_network_as_one_process_does(both):
    alone = small(Ranks(), True)
    close(both[0]['small', True], alone)
    assert equal(both[0]['small', True], both[1]['small', True])
    apart = both[0]['small', False]['0.weight'] - alone['0.weight'] # without the shared batch norm: the test would see it
    assert apart.abs().max() > 1e-2


def test_two_ranks_train_the_reader_as_one_process_does(both):
    "In fp64, where rounding is small: the weights after five steps of AdamW. The loss itself is always fp32."
    two, one = both[0]['reader', torch.float64], reader(Ranks(), torch.float64)
    close(two['weights'], one['weights'], atol=1e-8)
    torch.testing.assert_close(two['rows'], one['rows'], atol=1e-5, rtol=1e-6)


def test_in_fp32_two_ranks_differ_from_one_by_rounding(both):
    "The gradients by 1e-6. AdamW divides each by its own size and so makes rounding visible, as a batch in another order does."
    two, one, other = both[0]['reader', torch.float32], reader(Ranks(), torch.float32), reader(Ranks(), torch.float32, [4, 5, 6, 7, 0, 1, 2, 3])
    close(two['grads'], one['grads'], atol=2e-6)
    torch.testing.assert_close(two['rows'][0], one['rows'][0], atol=1e-5, rtol=1e-5)
    for r in two, other: torch.testing.assert_close(r['rows'], one['rows'], atol=0, rtol=5e-3)


def test_all_ranks_hold_the_same_weights_to_the_last_bit(both):
    for kind in torch.float32, torch.float64: assert equal(both[0]['reader', kind]['weights'], both[1]['reader', kind]['weights'])


# ------------------------------------------------------------------ faults

@pytest.mark.slow
def test_a_fault_of_rank_0_ends_all_of_them_with_its_message(tmp_path):
    done = torchrun('fails', tmp_path)
    assert done.returncode != 0
    assert 'kdocr: /data/plates: no such folder\n' in done.stderr


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_others_with_it(tmp_path):
    done = torchrun('dies', tmp_path) # PATIENCE is an hour, the limit here five minutes
    assert done.returncode != 0
    for r in range(2):
        with pytest.raises(ProcessLookupError): os.kill(int((tmp_path/f'pid{r}').read_text()), 0)


# ------------------------------------------------------------------ one process

def test_parts_are_equal_and_cover_the_batch():
    for world in 1, 2, 3, 8:
        assert [i for r in range(world) for i in range(48)[Place(r, world).part(48)]] == list(range(48))
    with pytest.raises(KdocrError, match='batch_size 10 has no equal shares for 4 ranks; take 8 or 12'): Place(0, 4).part(10)
    with pytest.raises(KdocrError, match='batch_size 3 has no equal shares for 4 ranks; take 4$'): Place(0, 4).part(3)


def test_each_rank_has_the_gpu_of_its_local_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [Place(5, 8, 1).device(n) for n in ('auto', 'cuda', 'cpu')] == ['cuda:1', 'cuda:1', 'cpu']
    assert [Place().device(n) for n in ('auto', 'cuda:1', 'cpu')] == ['auto', 'cuda:1', 'cpu']
    with pytest.raises(KdocrError, match="device 'cuda': no GPU for rank 2 of this machine, which has 2; 2 ranks will do"): Place(2, 4, 2).device('cuda')
    with pytest.raises(KdocrError, match="device 'cuda:1': 4 ranks cannot share it"): Place(2, 4, 1).device('cuda:1')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert Place(1, 2, 1).device('auto') == 'cpu'
    with pytest.raises(KdocrError, match='device cpu will do'): Place(1, 2, 1).device('cuda')


@pytest.mark.parametrize('device, backend, chosen', [('cpu', 'gloo', []), ('auto', 'cpu:gloo,cuda:nccl', ['cuda:1']), (torch.device('cuda'), 'cpu:gloo,cuda:nccl', ['cuda:1'])], ids=str)
def test_joining_takes_the_gpu_before_it_connects(monkeypatch, device, backend, chosen):
    "What is asked of torch on a machine of two GPUs; nothing is connected."
    for k, v in dict(WORLD_SIZE=4, RANK=3, LOCAL_RANK=1, MASTER_ADDR='localhost', MASTER_PORT=1).items(): monkeypatch.setenv(k, str(v))
    calls = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda d: calls.append(str(d)))
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, timeout: calls.append(backend))
    assert Ranks.join(device) == Ranks(3, 4, 1)
    assert calls == [*chosen, backend]


def test_an_incomplete_environment_is_refused(monkeypatch):
    for k in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('RANK', '0')
    with pytest.raises(KdocrError, match='no LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start with torchrun --nproc_per_node 2'): Ranks.join('cpu')


@pytest.mark.parametrize('world', [None, '1'])
def test_alone_nothing_happens(monkeypatch, world):
    monkeypatch.delenv('WORLD_SIZE', raising=False) if world is None else monkeypatch.setenv('WORLD_SIZE', world)
    with Ranks.join('auto') as ranks:
        assert ranks == Ranks(0, 1, 0) and ranks.leads and not dist.is_initialized()
        p = nn.Parameter(torch.ones(2)); p.grad = grad = torch.tensor([1., 2.])
        ranks.mean_grads([p, nn.Parameter(torch.ones(1))]); ranks.mean_([grad]); ranks.wait()
        assert p.grad is grad and grad.tolist() == [1., 2.]
        assert (ranks.any(0), ranks.any(1), ranks.gather(5), ranks.broadcast(6)) == (False, True, [5], 6)
        net = nn.Sequential(nn.BatchNorm2d(3))
        assert shared_batchnorm(net, ranks) is net and type(net[0]) is nn.BatchNorm2d
        with pytest.raises(OSError), main_first(ranks): raise OSError
    ranks.leave()


def test_a_shared_model_keeps_its_tensors_names_and_mode():
    model = make_model('restran_tiny').eval()
    before, kept = {k: v.clone() for k, v in model.state_dict().items()}, [id(t) for t in (*model.parameters(), *model.buffers())]
    count = sum(type(m) is nn.BatchNorm2d for m in model.modules())
    assert shared_batchnorm(model, Place(0, 2)) is model
    assert sum(type(m) is SharedBatchNorm for m in model.modules()) == count > 0 and not any(type(m) is nn.BatchNorm2d for m in model.modules())
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == kept and list(model.state_dict()) == list(before)
    assert not any(m.training for m in model.modules())
    fresh = make_model('restran_tiny').eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 1, 3, 32, 128)
    assert torch.equal(fresh(x)[0], model(x)[0]) # in eval mode, to the last bit and without a process group


def test_moments_of_unequal_parts_join():
    x = 1e6 + torch.randn(60, 3, dtype=torch.float64)
    parts = x.split([1, 9, 50])
    counts = torch.tensor([[float(len(p))] for p in parts], dtype=torch.float64)
    mean, var, n = join_moments(torch.stack([p.mean(0) for p in parts]), torch.stack([p.var(0, correction=0) for p in parts]), counts)
    assert n == 60
    torch.testing.assert_close(mean, x.mean(0)); torch.testing.assert_close(var, x.var(0, correction=0))


@pytest.fixture
def connected():
    "A process group of one, so that the layer's own code runs here."
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('affine', [True, False])
def test_the_gradient_is_the_derivative(connected, affine):
    layer = SharedBatchNorm(3, affine=affine).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    if not affine: assert torch.autograd.gradcheck(layer, (x,))
    else:
        weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(layer, {'weight': w, 'bias': b}, (x,)), (x, weight, bias))


def test_half_precision_is_normalised_by_fp32_statistics(connected):
    x = (3 + torch.randn(8, 4, 6, 6)).bfloat16().requires_grad_()
    plain, shared = nn.BatchNorm2d(4), SharedBatchNorm(4)
    ys = [layer(x) for layer in (plain, shared)]
    gs = [torch.autograd.grad((y * torch.arange(6.)).sum(), x)[0] for y in ys]
    assert ys[1].dtype == gs[1].dtype == torch.bfloat16 and shared.running_mean.dtype == torch.float32
    torch.testing.assert_close(shared.running_var, plain.running_var)
    torch.testing.assert_close(ys[1], ys[0], atol=.02, rtol=.02); torch.testing.assert_close(gs[1], gs[0], atol=.1, rtol=.05)


def test_frozen_weights_get_no_gradient(connected):
    layer = SharedBatchNorm(3)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 3, 2, 2, requires_grad=True)).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
