"""The command under torchrun: two processes train as one does, write one set of files, and a fault in one ends both."""
import os
import subprocess
import sys

import pytest
import torch

from kdocr.core import read_json
from kdocr.training.run_folder import RunFolder, load_checkpoint
from small_runs import SMALL, drawn, flags, same_end, timeless

pytestmark = pytest.mark.slow
TEACHER = dict(mode='teacher', steps=8, log_every=2)


def launch(*args, script=('-m', 'kdocr.training.command'), **env):
    how = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *script]
    return subprocess.run([*how, *map(str, args)], capture_output=True, text=True, timeout=240, env=dict(os.environ, OMP_NUM_THREADS='1', **env))


def asked(out, **values): return flags(**{**SMALL, 'data': drawn(), 'out': out, **values})


def train(out, **values):
    p = launch(*asked(out, **values))
    assert p.returncode == 0, p.stderr[-3000:]
    return RunFolder(out/values['name'])


@pytest.fixture(scope='module')
def quiet(tmp_path_factory):
    "A teacher that two processes trained, undisturbed."
    return train(tmp_path_factory.mktemp('quiet'), name='quiet', **TEACHER)


EVAL_BATCHNORM = '''
import sys
from torch import nn
nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)
from kdocr.training.command import train_command
sys.exit(train_command())'''

def test_two_processes_train_as_one_does(quiet, tmp_path):
    "With BatchNorm in eval mode: in train mode each CPU rank normalises by its own shard, as DistributedDataParallel does."
    (tmp_path/'frozen.py').write_text(EVAL_BATCHNORM)
    student = dict(mode='student', steps=4, lr=1e-4, recombine_p=.5, teacher_checkpoint=str(quiet.published))
    one = subprocess.run([sys.executable, str(tmp_path/'frozen.py'), *asked(tmp_path, name='one', **student)], capture_output=True, text=True)
    two = launch(*asked(tmp_path, name='two', **student), script=(str(tmp_path/'frozen.py'),))
    assert (one.returncode, two.returncode) == (0, 0), one.stderr[-2000:] + two.stderr[-2000:]
    one, two = RunFolder(tmp_path/'one'), RunFolder(tmp_path/'two')
    terms = [[{k: v for k, v in row.items() if not k.startswith('val_')} for row in timeless(run)] for run in (one, two)]
    assert len(terms[0]) == len(terms[1])
    for a, b in zip(*terms): assert b == pytest.approx(a, rel=1e-2, abs=1e-3), 'every term of every step'
    a, b = (load_checkpoint(run.last)['model'] for run in (one, two))
    assert all(torch.allclose(v, b[k], atol=1e-3) for k, v in a.items() if v.is_floating_point()) # AdamW divides rounding by itself
    assert {p.name for p in one.path.iterdir()} == {p.name for p in two.path.iterdir()}, 'only one of them writes'
    assert [p.key for p in one.predictions()] == [p.key for p in two.predictions()], 'each track once, in order'
    assert read_json(one.scores)['val']['n'] == read_json(two.scores)['val']['n']


def test_what_both_cannot_do_is_refused(tmp_path):
    odd = launch(*asked(tmp_path, mode='teacher', name='odd', batch_size=7))
    assert odd.returncode != 0 and 'batch_size 7 has no equal shares for 2 ranks; take 6 or 8' in odd.stderr
    lost = launch(*asked(tmp_path, mode='teacher', name='lost', data=tmp_path/'nowhere'))
    assert lost.returncode != 0 and lost.stderr.count('nowhere: no such folder') >= 2, 'a fault of the first reaches the second'


STOP = '''
import os, signal, sys
from kdocr.training.command import train_command
from kdocr.training.trainer import Trainer
whole, at, how = Trainer.losses, int(os.environ['AT']), getattr(signal, os.environ['HOW'])
def losses(self, batch):
    if self.step == at and self.ctx.rank == 1: os.kill(os.getpid(), how)
    return whole(self, batch)
Trainer.losses = losses
sys.exit(train_command())'''


def test_a_training_whose_rank_was_stopped_goes_on_as_if_nothing_had_been(quiet, tmp_path):
    (tmp_path/'stop.py').write_text(STOP)
    run = RunFolder(tmp_path/'stopped')
    for how, at, saved in (('SIGKILL', 3, 3), ('SIGTERM', 5, 6)):
        p = launch(*asked(tmp_path, name='stopped', **TEACHER), script=(str(tmp_path/'stop.py'),), HOW=how, AT=str(at))
        assert p.returncode != 0 and not run.finished and load_checkpoint(run.last)['step'] == saved, p.stderr[-2000:]
    assert same_end(quiet, train(tmp_path, name='stopped', **TEACHER))
