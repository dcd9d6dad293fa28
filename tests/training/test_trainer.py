"""The loop: interrupted and resumed equals uninterrupted, and what stops a run leaves its last good checkpoint."""
import errno
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kdocr.charset import Charset
from kdocr.core import KdocrError, Stopped, read_json
from kdocr.data.batches import open_data
from kdocr.training.distillation import TrainerDistill
from kdocr.training.networks import freeze
from kdocr.models.restran import PRESETS, ResTranOCR_Distill, make_model
from kdocr.training.run_folder import RunFolder, load_checkpoint
from kdocr.training.trainer import Trainer, Trainer, lr_at
from kdocr.training.evaluation import evaluate
from kdocr.training.device import pick_precision
from kdocr.training.train_kd import train_kd
from small_runs import SMALL, drawn, flags, same, same_end, small, timeless


def model(seed=0, dropout=0.1):
    "With dropout, so that the random numbers of a step matter."
    torch.manual_seed(seed)
    return ResTranOCR_Distill(replace(PRESETS['restran_tiny'], dropout=dropout))


def trainer(tmp_path, name, **values):
    cfg = small(tmp_path, name=name, **values)
    return Trainer(cfg, RunFolder(cfg.out/name), open_data(cfg), model())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A teacher's run that nothing disturbed."
    t = trainer(tmp_path_factory.mktemp('whole'), 'whole')
    t.fit()
    return t.run


def test_the_learning_rate_is_one_cycle():
    lrs = [lr_at(s, 200, 1., .15) for s in range(200)]
    assert max(lrs) == lrs[30] == 1 and lrs[0] == pytest.approx(1 / 25) and lrs[-1] < 1e-3
    assert lrs[:30] == sorted(lrs[:30]) and lrs[30:] == sorted(lrs[30:], reverse=True)
    assert lr_at(0, 1, 1., 0.) == 1. and lr_at(0, 1, 1., .99) > 0


def test_a_run_leaves_what_it_promises(whole):
    rows = timeless(whole)
    steps, vals = [r for r in rows if 'loss' in r], [r for r in rows if 'val_exact_match' in r]
    assert [r['step'] for r in steps] == list(range(1, 11)) and [r['step'] for r in vals] == [4, 8, 10]
    assert set(steps[0]) == {'step', 'epoch', 'lr', 'grad_norm', 'loss', 'ctc'} and steps[0]['loss'] == steps[0]['ctc']
    best, scores = load_checkpoint(whole.best), read_json(whole.scores)
    assert best['scores']['cer'] == min(r['val_cer'] for r in vals) == scores['val']['cer'] and scores['step'] == best['step']
    assert not any('optimizer' in k for k in best) and scores['val']['n'] == len(whole.predictions('val'))


@pytest.mark.parametrize('stop_at', [1, 4, 7, 9])
def test_stopped_and_resumed_is_uninterrupted(whole, tmp_path, stop_at):
    "A signal after step `stop_at`; then a new trainer, with other random numbers in between."
    class Interrupted(Trainer):
        def losses(self, batch):
            if self.step == stop_at - 1: os.kill(os.getpid(), signal.SIGINT)
            return super().losses(batch)
    cfg = small(tmp_path, name='parts')
    first = Interrupted(cfg, RunFolder(tmp_path/'parts'), open_data(cfg), model())
    with pytest.raises(Stopped, match=f'saved at step {stop_at} of 10; the same command goes on') as e: first.fit()
    assert e.value.exit_code == 130 and not first.run.finished and load_checkpoint(first.run.last)['step'] == stop_at
    second = Trainer(cfg, first.run, open_data(cfg), model(seed=99))
    second.fit()
    assert same_end(second.run, whole)


def test_a_student_with_projections_resumes_exactly(tmp_path):
    "The projections and their moments are part of what goes on."
    def student(name):
        cfg = small(tmp_path, name=name, mode='student', teacher_checkpoint='unused')
        torch.manual_seed(1)
        arch = PRESETS['restran_tiny']
        teacher = ResTranOCR_Distill(replace(arch, widths=(*arch.widths[:-1], 48)))
        return TrainerDistill(cfg, RunFolder(tmp_path/name), open_data(cfg), model(), freeze(teacher))
    a, b = student('a'), student('b')
    for r in a.steps(): pass
    for r in b.steps():
        if b.step == 5: break
    b.run.log.cut(0)
    b.save()
    c = student('b')
    c.resume()
    for r in c.steps(): pass
    assert same(a.model.state_dict(), c.model.state_dict()) and same(a.project.state_dict(), c.project.state_dict())
    assert same(a.opt.state_dict(), c.opt.state_dict()) and list(a.project.parameters())


def test_what_others_draw_between_two_steps_changes_nothing(tmp_path):
    a, b = (Trainer(t.cfg, t.run, t.data, t.model) for t in (trainer(tmp_path, 'a'), trainer(tmp_path, 'b')))
    for _ in a.steps(): pass
    for _ in b.steps(): torch.rand(7); evaluate(b.model, b.data.val, b.charset, b.device)
    assert same(a.model.state_dict(), b.model.state_dict())


def test_log_cadence_changes_nothing(whole, tmp_path):
    t = trainer(tmp_path, 'often', log_every=1, checkpoint_every=7)
    t.fit()
    assert timeless(t.run) == timeless(whole) and same(load_checkpoint(t.run.best)['model'], load_checkpoint(whole.best)['model'])


def test_nan_stops_the_run_by_name_and_keeps_the_checkpoint(tmp_path):
    class Broken(Trainer):
        def losses(self, batch):
            parts = super().losses(batch)
            return {**parts, 'loss': parts['loss'] * math.inf} if self.step == 7 else parts
    cfg = small(tmp_path, name='nan')
    t = Broken(cfg, RunFolder(tmp_path/'nan'), open_data(cfg), model())
    with pytest.raises(KdocrError) as e: t.fit()
    assert 'step 8: grad_norm, loss not finite' in str(e.value)
    assert all(k in str(e.value) for k in t.batch(7).keys)
    good = load_checkpoint(t.run.last)
    assert good['step'] == 6 and all(v.isfinite().all() for v in good['model'].values()) and not t.run.finished
    assert [r['step'] for r in t.run.log.rows() if 'loss' in r] == list(range(1, 8))


def test_full_disk_then_space_again(whole, tmp_path, monkeypatch):
    t, save, written = trainer(tmp_path, 'full'), torch.save, []
    def full(obj, f):
        written.append(f)
        if len(written) > 3: f.write(b'half'); raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(obj, f)
    with monkeypatch.context() as m, pytest.raises(KdocrError, match='No space left on device'):
        m.setattr(torch, 'save', full)
        t.fit()
    assert load_checkpoint(t.run.last)['step'] == 4 and not list((t.run.path/'checkpoints').glob('.*'))
    again = trainer(tmp_path, 'full')
    again.fit()
    assert same_end(again.run, whole)


def test_a_full_gpu_is_said_with_the_batch(tmp_path):
    t = trainer(tmp_path, 'large')
    def losses(batch): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 3.00 GiB')
    t.losses = losses
    with pytest.raises(KdocrError, match='is full at batch_size 8 .*Tried to allocate 3.00 GiB.*a smaller batch_size'): t.fit()


@pytest.mark.parametrize('capability, half', [((7, 0), 'fp16'), ((7, 5), 'fp16'), ((8, 0), 'bf16'), ((8, 9), 'bf16'), ((10, 0), 'bf16')])
def test_the_card_chooses_the_precision(monkeypatch, capability, half):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert pick_precision('auto', torch.device('cuda')) == half and pick_precision('fp32', torch.device('cuda')) == 'fp32' and pick_precision('auto', torch.device('cpu')) == 'fp32'


def test_a_run_says_what_it_took(whole):
    usage = read_json(whole.env)['usage']
    assert usage['steps'] == 10 and usage['device'] == 'cpu' and usage['precision'] == 'fp32' and usage['ranks'] == 1 and usage['gpu_utilisation'] is None
    assert usage['peak_memory_mb'] > 50 and 0 < usage['steps_per_s'] == pytest.approx(10 / usage['seconds'], rel=.01)


def test_text_that_the_steps_cannot_spell(tmp_path):
    cfg = small(tmp_path, width=32)
    with pytest.raises(KdocrError, match=r"track_\d+: '\w+' needs \d+ CTC steps, the model has 4"): Trainer(cfg, RunFolder(tmp_path/'x'), open_data(cfg), model())


def test_text_outside_the_charset(tmp_path):
    cfg = small(tmp_path, charset='ABC')
    with pytest.raises(KdocrError, match="track_.*is not in the charset 'ABC'"): Trainer(cfg, RunFolder(tmp_path/'x'), open_data(cfg), make_model('restran_tiny', 4))


def test_evaluate_ignores_batching_and_keeps_the_mode(whole, tmp_path):
    t = trainer(tmp_path, 'eval')
    t.model.train()
    a = evaluate(t.model, t.data.val, Charset(), t.device, batch_size=3)
    b = evaluate(t.model, t.data.val, Charset(), t.device, batch_size=64)
    assert t.model.training and [p.key for p in a] == [p.key for p in b] == t.data.val.keys
    assert [p.pred for p in a] == [p.pred for p in b]


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_keeps_losses_whole(tmp_path, precision):
    t = trainer(tmp_path, precision, precision=precision, steps=2)
    for r in t.steps(): assert r['loss'].dtype == torch.float32 and r['loss'].isfinite()
    assert all(p.dtype == torch.float32 for p in t.model.parameters())


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory): return train_kd(small(tmp_path_factory.mktemp('undisturbed'), name='whole'))


DIES = """
import os, signal, sys, torch
from kdocr.training import trainer as train, command
losses, save, saved = train.Trainer.losses, torch.save, []
def die_in_step(self, batch):
    if self.step == 7: os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return losses(self, batch)
def die_in_save(obj, f):
    saved.append(f)
    if len(saved) == 4: f.write(b'PK half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)
    save(obj, f)
if sys.argv[2] == 'step': train.Trainer.losses = die_in_step
if sys.argv[2] == 'save': torch.save = die_in_save
sys.exit(command.train_command(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize('sig, where, code', [('SIGKILL', 'step', -9), ('SIGKILL', 'save', -9), ('SIGTERM', 'step', 143)])
def test_killed_and_run_again_is_uninterrupted(undisturbed, tmp_path, sig, where, code):
    "The command dies in a process of its own; the same settings again, in this one, go on."
    killed = subprocess.run([sys.executable, '-c', DIES, sig, where, *flags(**SMALL, data=drawn(), out=tmp_path, name='killed')], capture_output=True, text=True)
    assert killed.returncode == code, killed.stderr
    if code > 0: assert f'stopped by {sig}; {tmp_path}/killed is saved at step 8 of 10; the same command goes on from there' in killed.stderr
    assert 0 < load_checkpoint(tmp_path/'killed'/'checkpoints'/'last.pth')['step'] < 10
    assert same_end(train_kd(small(tmp_path, name='killed')), undisturbed)


def test_a_compiled_network_computes_the_same_under_the_same_names(tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: real(f, backend='eager')) # the compiler's capture, without its code generation
    plain, compiled = (trainer(tmp_path, c, compile=c, steps=2) for c in ('off', 'on'))
    names = list(plain.model.state_dict())
    a, b = ([{k: float(v) for k, v in r.items()} for r in t.steps()] for t in (plain, compiled))
    assert a == b and list(compiled.model.state_dict()) == names
