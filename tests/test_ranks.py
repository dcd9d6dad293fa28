"""Two processes and one: the same step, the same run, one set of files; and a fault in one ends both."""
import os
import subprocess
import sys

import pytest
import torch

from kdocr.core import KdocrError, read_json
from kdocr.ranks import Ranks
from kdocr.run import RunFolder, load_checkpoint
from training import SMALL, drawn, flags, timeless

pytestmark = pytest.mark.slow


def launch(n, *args, script=('-m', 'kdocr.train_kd')):
    how = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), *script] if n > 1 else [*script]
    return subprocess.run([sys.executable, *how, *map(str, args)], capture_output=True, text=True, timeout=240, env=dict(os.environ, OMP_NUM_THREADS='1'))


def train(n, out, **values):
    p = launch(n, *flags(**{**SMALL, 'data': drawn(), 'out': out, **values}))
    assert p.returncode == 0, p.stderr[-3000:]
    return RunFolder(out/values['name']), p


def near(a, b, tolerance=2e-3):
    for k, v in a.items():
        if torch.is_tensor(v) and v.is_floating_point(): assert torch.allclose(v, b[k], atol=tolerance), k
        elif isinstance(v, dict): near(v, b[k], tolerance)


@pytest.mark.parametrize('how', [dict(), dict(recombine=.5), dict(geometry_views=2)], ids=str)
def test_two_processes_train_as_one_does(tmp_path, how):
    teacher, _ = train(1, tmp_path, mode='teacher', name='hr', steps=4)
    runs = [train(n, tmp_path, mode='student', name=f'lr{n}', steps=4, teacher_checkpoint=teacher.published, **{k: v for k, v in how.items()})[0] for n in (1, 2)]
    one, two = (timeless(r) for r in runs)
    assert len(one) == len(two)
    for a, b in zip(one, two):
        numbers = {k: v for k, v in a.items() if v is not None}
        assert a.keys() == b.keys() and {k: b[k] for k in numbers} == pytest.approx(numbers, rel=1e-2, abs=1e-3), 'every term of every step'
    near(*(load_checkpoint(r.last)['model'] for r in runs))
    assert set(p.name for p in runs[0].path.iterdir()) == set(p.name for p in runs[1].path.iterdir()), 'only one of them writes'
    assert [p.key for p in runs[0].predictions()] == [p.key for p in runs[1].predictions()], 'each track once, in order'
    assert read_json(runs[1].scores)['val']['n'] == read_json(runs[0].scores)['val']['n']


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    p = launch(2, *flags(**{**SMALL, 'batch_size': 7}, data=drawn(), out=tmp_path, mode='teacher', name='odd'))
    assert p.returncode != 0 and 'batch_size: 7 tracks cannot be shared equally by 2 processes' in p.stderr


def test_a_fault_in_the_first_ends_both(tmp_path):
    p = launch(2, *flags(**SMALL, data=tmp_path/'nowhere', out=tmp_path, mode='teacher', name='x'))
    assert p.returncode != 0 and p.stderr.count('nowhere: no such folder') >= 2, p.stderr[-2000:]


NORM = '''
import torch
from torch import nn
from kdocr.ranks import Ranks, shared_batchnorm
torch.set_num_threads(1)
ranks = Ranks.join('cpu')
torch.manual_seed(0)
whole, x = nn.BatchNorm2d(5), torch.randn(6, 5, 3, 4) * 3 + 100
shared = shared_batchnorm(nn.Sequential(nn.BatchNorm2d(5)), ranks)
for m in (whole, shared[0]): nn.init.uniform_(m.weight, generator=torch.Generator().manual_seed(1))
a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
w = torch.randn(6, 5, 3, 4)
want, got = whole(a), shared(b[ranks.part(6)])
(want * w).mean().backward(); (got * w[ranks.part(6)]).mean().backward()
grad, mine = a.grad[ranks.part(6)], b.grad[ranks.part(6)] / ranks.world
ranks.mean_grads(shared.parameters())
assert torch.allclose(got, want[ranks.part(6)], atol=1e-5)
assert torch.allclose(mine, grad, atol=1e-6), (mine - grad).abs().max()
assert torch.allclose(shared[0].weight.grad, whole.weight.grad, atol=1e-5) and torch.allclose(shared[0].bias.grad, whole.bias.grad, atol=1e-6)
assert all(torch.allclose(v, whole.state_dict()[k.split('.')[1]], atol=1e-4) for k, v in shared.state_dict().items())
assert torch.equal(shared.eval()(x), nn.functional.batch_norm(x, shared[0].running_mean, shared[0].running_var, shared[0].weight, shared[0].bias))
assert ranks.gather(ranks.rank) == [0, 1] and ranks.tell(ranks.rank) == 0
print('well')
'''


def test_batchnorm_counts_all_samples(tmp_path):
    (tmp_path/'norm.py').write_text(NORM)
    p = launch(2, script=(str(tmp_path/'norm.py'),))
    assert p.returncode == 0 and p.stdout.count('well') == 2, p.stderr[-3000:]


def test_a_killed_rank_ends_the_other(tmp_path):
    (tmp_path/'die.py').write_text('''
import os, signal
from kdocr.ranks import Ranks
ranks = Ranks.join('cpu')
if ranks.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
ranks.wait()''')
    assert launch(2, script=(str(tmp_path/'die.py'),)).returncode != 0


def test_alone_every_method_is_free():
    alone = Ranks()
    with alone.first(): pass
    alone.wait()
    assert alone.leads and alone.part(7) == slice(0, 7) and alone.gather(3) == [3] and alone.tell('x') == 'x'
    with pytest.raises(KdocrError, match='batch_size: 10'): Ranks(0, 4).part(10)
