"""The command under torchrun: two processes train as one does, write one set of files, and a fault in one ends both."""
import os
import subprocess
import sys

import pytest
import torch

from kdocr.core import read_json
from kdocr.run import RunFolder, load_checkpoint
from training import SMALL, drawn, flags, same_end, timeless

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
    assert p.returncode != 0 and 'batch_size 7 has no equal shares for 2 ranks; take 6 or 8' in p.stderr


def test_a_fault_in_the_first_ends_both(tmp_path):
    p = launch(2, *flags(**SMALL, data=tmp_path/'nowhere', out=tmp_path, mode='teacher', name='x'))
    assert p.returncode != 0 and p.stderr.count('nowhere: no such folder') >= 2, p.stderr[-2000:]


@pytest.mark.parametrize('how', ['SIGKILL', 'SIGTERM'])
def test_a_training_whose_rank_was_stopped_goes_on_as_if_nothing_had_been(tmp_path, how):
    (tmp_path/'stop.py').write_text(f'''
import os, signal, sys
from kdocr.train import Stepper
from kdocr.train_kd import main
whole = Stepper.losses
def losses(self, batch):
    if self.step == 5 and self.ranks.rank == 1: os.kill(os.getpid(), signal.{how})
    return whole(self, batch)
Stepper.losses = losses
sys.exit(main())''')
    asked = dict(mode='teacher', steps=8, log_every=2)
    quiet, _ = train(2, tmp_path, name='quiet', **asked)
    p = launch(2, *flags(**{**SMALL, 'data': drawn(), 'out': tmp_path, 'name': 'stopped', **asked}), script=(str(tmp_path/'stop.py'),))
    stopped = RunFolder(tmp_path/'stopped')
    assert p.returncode != 0 and not stopped.finished and load_checkpoint(stopped.last)['step'] == (4 if how == 'SIGKILL' else 6)
    stopped, _ = train(2, tmp_path, name='stopped', **asked)
    assert same_end(quiet, stopped)
