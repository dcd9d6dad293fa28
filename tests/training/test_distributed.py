"""Several ranks do what one does. torchrun starts this very file for the jobs; pytest runs the same jobs alone and compares."""
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kdocr.charset import Charset
from kdocr.core import KdocrError, guard
from kdocr.distill.ctc import ctc_loss
from kdocr.models.restran import make_model
from kdocr.training.distributed import DistContext, TapsModule, data_parallel, main_first, sync_batchnorm

CPU = torch.device('cpu')


# ------------------------------------------------------------------ jobs: the same code for one rank and for two

def means(ctx):
    r = float(ctx.rank)
    tensors = [torch.full((3, 2), r).T, torch.tensor(r), torch.full((2,), r, dtype=torch.float64),
               torch.full((4,), r, dtype=torch.bfloat16), nn.Parameter(torch.tensor([r])),
               torch.full((2, 3, 2, 2), r).to(memory_format=torch.channels_last)]
    ctx.mean_(tensors)
    return [t.detach().float() for t in tensors]


def talk(ctx):
    return dict(gathered=ctx.gather({'rank': ctx.rank, 'pad': 'x' * 100 * ctx.rank}), told=ctx.broadcast(f'from {ctx.rank}'),
                again=DistContext.init('cpu') == ctx)


def order(ctx, path):
    "What each rank finds when its turn comes; then a failure on rank 0, after which all still are in step."
    with main_first(ctx):
        found = path.exists()
        if ctx.is_main: time.sleep(.5); path.write_text('packed')
    heard = []
    for fault in OSError('disk full'), KdocrError('/data/plates: no such folder'):
        try:
            with main_first(ctx):
                if ctx.is_main: raise fault
                heard.append('a body that should not run')
        except (OSError, KdocrError) as e: heard.append((type(e).__name__, str(e)))
    return dict(found=found, heard=heard, after=ctx.gather('here'))


def reader(ctx, kind, order=range(8)):
    "Five steps of the real network with its real loss, clipping and optimizer, BatchNorm in eval mode; a batch is 8 tracks."
    torch.manual_seed(0)
    charset, order = Charset('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ'), list(order)
    model = make_model('restran_tiny', len(charset)).train().to(kind)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    forward, params = data_parallel(model, ctx, CPU), list(model.parameters())
    opt, part, rows = torch.optim.AdamW(params, 1e-3, weight_decay=1e-4, fused=True), ctx.shard(8), []
    all_texts = ['ABC1D23', 'BRA2E19', 'KDO4C26', 'QXR0157', 'JKL7M89', 'IFY3002', 'AAA1111', 'SUN0B77']
    for step in range(5):
        images, texts = torch.randn(8, 1, 3, 32, 128).clamp(-1, 1)[order].to(kind), [all_texts[i] for i in order]
        torch.manual_seed(step)
        out = forward(images[part])
        loss = ctc_loss(out.logits, texts[part], charset) + out.taps['transformer_out'].square().mean()
        loss.backward()
        if step == 0: grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(params, 1.)
        opt.step()
        opt.zero_grad()
        rows.append(torch.stack((loss.detach().to(kind), norm)))
    ctx.mean_(rows)
    return dict(rows=torch.stack(rows), grads=grads, weights=model.state_dict())


def all_jobs(ctx, out):
    done = dict(means=means(ctx), talk=talk(ctx), order=order(ctx, out/'packed'))
    done |= {('reader', k): reader(ctx, k) for k in (torch.float32, torch.float64)}
    torch.save(done, out/f'{ctx.rank}.pt')


def fails(ctx, out):
    with main_first(ctx):
        if ctx.is_main: raise KdocrError('/data/plates: no such folder')


def dies(ctx, out):
    (out/f'pid{ctx.rank}').write_text(str(os.getpid()))
    ctx.barrier()
    if ctx.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    ctx.mean_([torch.ones(3)]) # rank 0 waits here for a partner that is no more


def main(job, out):
    torch.set_num_threads(1)
    with DistContext.init('cpu') as ctx: {'all_jobs': all_jobs, 'fails': fails, 'dies': dies}[job](ctx, Path(out))

if __name__ == '__main__': # a rank leaves by os._exit, as `kdocr.training.command` does: gloo's threads may abort an orderly exit
    status = guard(main, *sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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

def close(a, b, atol=1e-5):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], atol=atol, rtol=1e-5, msg=lambda m: f'{k}: {m}')

def equal(a, b): return all(torch.equal(a[k], b[k]) for k in a.keys() | b.keys())


def test_means_are_over_all_ranks(both):
    for m in (b['means'] for b in both): assert all(torch.equal(t, torch.full_like(t, .5)) for t in m)


def test_ranks_agree(both):
    for t in (b['talk'] for b in both):
        assert t['told'] == 'from 0' and t['again'] is True
        assert t['gathered'] == [{'rank': 0, 'pad': ''}, {'rank': 1, 'pad': 'x' * 100}]


def test_rank_0_goes_first_and_its_failure_reaches_the_others(both):
    lead, other = (b['order'] for b in both)
    assert (lead['found'], other['found']) == (False, True)
    assert lead['heard'] == [('OSError', 'disk full'), ('KdocrError', '/data/plates: no such folder')]
    assert other['heard'] == [('KdocrError', 'rank 0: OSError: disk full'), ('KdocrError', 'rank 0: /data/plates: no such folder')]
    assert lead['after'] == other['after'] == ['here', 'here']


def test_two_ranks_train_the_reader_as_one_process_does(both):
    "In fp64, where rounding is small: the weights after five steps of AdamW. The loss itself is always fp32."
    two, one = both[0]['reader', torch.float64], reader(DistContext(), torch.float64)
    close(two['weights'], one['weights'], atol=1e-8)
    torch.testing.assert_close(two['rows'], one['rows'], atol=1e-5, rtol=1e-6)


def test_in_fp32_two_ranks_differ_from_one_by_rounding(both):
    "The gradients by 1e-6. AdamW divides each by its own size and so makes rounding visible, as a batch in another order does."
    two, one, other = both[0]['reader', torch.float32], reader(DistContext(), torch.float32), reader(DistContext(), torch.float32, [4, 5, 6, 7, 0, 1, 2, 3])
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
        assert [i for r in range(world) for i in range(48)[DistContext(r, world).shard(48)]] == list(range(48))
    with pytest.raises(KdocrError, match='batch_size 10 has no equal shares for 4 ranks; take 8 or 12'): DistContext(0, 4).shard(10)
    with pytest.raises(KdocrError, match='batch_size 3 has no equal shares for 4 ranks; take 4$'): DistContext(0, 4).shard(3)


def test_each_rank_has_the_gpu_of_its_local_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [DistContext(5, 8, 1).device(n) for n in ('auto', 'cuda', 'cpu')] == ['cuda:1', 'cuda:1', 'cpu']
    assert [DistContext().device(n) for n in ('auto', 'cuda:1', 'cpu')] == ['auto', 'cuda:1', 'cpu']
    with pytest.raises(KdocrError, match="device 'cuda': no GPU for rank 2 of this machine, which has 2; 2 ranks will do"): DistContext(2, 4, 2).device('cuda')
    with pytest.raises(KdocrError, match="device 'cuda:1': 4 ranks cannot share it"): DistContext(2, 4, 1).device('cuda:1')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert DistContext(1, 2, 1).device('auto') == 'cpu'
    with pytest.raises(KdocrError, match='device cpu will do'): DistContext(1, 2, 1).device('cuda')


@pytest.mark.parametrize('device, backend, chosen', [('cpu', 'gloo', []), ('auto', 'cpu:gloo,cuda:nccl', ['cuda:1']), (torch.device('cuda'), 'cpu:gloo,cuda:nccl', ['cuda:1'])], ids=str)
def test_joining_takes_the_gpu_before_it_connects(monkeypatch, device, backend, chosen):
    "What is asked of torch on a machine of two GPUs; nothing is connected."
    for k, v in dict(WORLD_SIZE=4, RANK=3, LOCAL_RANK=1, MASTER_ADDR='localhost', MASTER_PORT=1).items(): monkeypatch.setenv(k, str(v))
    calls = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda d: calls.append(str(d)))
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, timeout: calls.append(backend))
    assert DistContext.init(device) == DistContext(3, 4, 1)
    assert calls == [*chosen, backend]


def test_an_incomplete_environment_is_refused(monkeypatch):
    for k in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('RANK', '0')
    with pytest.raises(KdocrError, match='LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start with torchrun --nproc_per_node 2'): DistContext.init('cpu')


@pytest.mark.parametrize('world', [None, '1'])
def test_alone_nothing_happens(monkeypatch, world):
    if world is None: monkeypatch.delenv('WORLD_SIZE', raising=False)
    else: monkeypatch.setenv('WORLD_SIZE', world)
    with DistContext.init('auto') as ctx:
        assert ctx == DistContext(0, 1, 0) and ctx.is_main and not dist.is_initialized()
        grad = torch.tensor([1., 2.])
        ctx.mean_([grad])
        ctx.barrier()
        assert grad.tolist() == [1., 2.] and (ctx.gather(5), ctx.broadcast(6)) == ([5], 6)
        net = nn.Sequential(nn.BatchNorm2d(3))
        assert sync_batchnorm(net, ctx, CPU) is net and type(net[0]) is nn.BatchNorm2d
        model = make_model('restran_tiny').eval()
        x = torch.randn(2, 1, 3, 32, 128)
        forward = data_parallel(model, ctx, CPU)
        assert type(forward) is TapsModule and torch.equal(forward(x).logits, model.forward_taps(x).logits)
        with pytest.raises(OSError), main_first(ctx): raise OSError
    ctx.destroy()


def test_on_gpus_the_batch_norm_is_synchronised_and_keeps_its_tensors():
    model = make_model('restran_tiny')
    before = {id(t) for t in (*model.parameters(), *model.buffers())}
    count = sum(type(m) is nn.BatchNorm2d for m in model.modules())
    assert sync_batchnorm(model, DistContext(0, 2), CPU) is model, 'on a CPU torch has none'
    shared = sync_batchnorm(model, DistContext(0, 2), torch.device('cuda', 0))
    assert sum(type(m) is nn.SyncBatchNorm for m in shared.modules()) == count > 0
    assert {id(t) for t in shared.parameters()} <= before
