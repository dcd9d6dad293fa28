"""The run folder: whole checkpoints, refusals by name, and an order of writing that survives a kill."""
import errno
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from kdocr.training import run_folder as run_module
from kdocr.charset import DEFAULT_CHARS
from kdocr.config import Config, load_config, make_config
from kdocr.core import KdocrError
from kdocr.metrics import Prediction
from kdocr.models.restran import make_model
from kdocr.training.run_folder import (FREE_SETTINGS, RunFolder, RunLog, describe, load_checkpoint, load_model,
                                       on_disk, save_checkpoint, state_hash)

IDS = dict(data_fingerprint='d1', split_hash='s1', teacher_hash=None)


@pytest.fixture
def cfg(tmp_path): return make_config(dict(out=str(tmp_path), name='r'))


def about(step): return dict(describe(make_config({}), 'restran_tiny', 's1'), model={}, step=step)


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    "The system says ENOSPC in the middle of the second checkpoint."
    path = save_checkpoint(tmp_path/'last.pth', about(100))
    def full(obj, f):
        f.write(b'half a checkpoint')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(KdocrError, match='last.pth: could not be written .No space left on device'): save_checkpoint(path, about(200))
    assert load_checkpoint(path)['step'] == 100
    assert [p.name for p in tmp_path.iterdir()] == ['last.pth']


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_on_disk_names_the_file_whatever_way_torch_reports_it(tmp_path):
    for target in ('/dev/full', open('/dev/full', 'wb')):
        with pytest.raises(KdocrError, match='x.pth: could not be written') if not isinstance(target, str) else pytest.raises((KdocrError, RuntimeError)):
            with on_disk(tmp_path/'x.pth'): torch.save({'a': torch.zeros(100_000)}, target)


def test_a_fault_of_ours_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match='ours'):
        with on_disk(tmp_path/'x'): raise RuntimeError('ours')


def test_kill_during_a_checkpoint_keeps_the_one_before(tmp_path):
    "SIGKILL between the bytes of the second checkpoint: nothing of ours runs any more."
    code = f"""
import os, signal, torch
from kdocr.training.run_folder import save_checkpoint
about = {about(0)!r}
save_checkpoint({str(tmp_path/'last.pth')!r}, dict(about, step=100))
def die(obj, f):
    f.write(b'PK half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)
torch.save = die
save_checkpoint({str(tmp_path/'last.pth')!r}, dict(about, step=200))
"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path/'last.pth')['step'] == 100


@pytest.mark.parametrize('keep', [0, 1, 100, 1000, -1])
def test_a_checkpoint_cut_short_is_named(tmp_path, keep):
    path = save_checkpoint(tmp_path/'t.pth', dict(about(1), model=make_model('restran_tiny').state_dict()))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(KdocrError, match='t.pth: damaged'): load_checkpoint(path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'boom'),)
    (tmp_path/'bomb.pth').write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save(Bomb(), tmp_path/'bomb2.pth')
    for name in ('bomb.pth', 'bomb2.pth'):
        with pytest.raises(KdocrError, match=name): load_checkpoint(tmp_path/name)
    assert not (tmp_path/'boom').exists()


def test_load_model_is_strict_and_exact(tmp_path):
    torch.manual_seed(3)
    model = make_model('restran_tiny')
    path = save_checkpoint(tmp_path/'m.pth', dict(about(1), model=model.state_dict()))
    assert state_hash(load_model(path)) == state_hash(model) and not load_model(path).training
    state = model.state_dict()
    state.pop(next(iter(state)))
    save_checkpoint(path, dict(about(1), model=state))
    with pytest.raises(KdocrError, match='do not fit a restran_tiny'): load_model(path)
    save_checkpoint(path, dict(format=1)) # as a version of kdocr without schema_version wrote it
    with pytest.raises(KdocrError, match='m.pth: no schema_version, needed is 2') as e: load_model(path)
    assert '\n' not in str(e.value)
    save_checkpoint(path, dict(schema_version=2))
    with pytest.raises(KdocrError, match='m.pth: not a kdocr checkpoint'): load_model(path)
    save_checkpoint(path, about(1))
    with pytest.raises(KdocrError, match="charset is '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ', needed is 'AB'"): load_model(path, dict(charset='AB'))


def test_free_settings_are_settings(): assert set(FREE_SETTINGS) <= set(Config.model_fields)


def test_a_folder_is_claimed_once(cfg):
    run = RunFolder(cfg.out/cfg.name)
    run.claim(cfg, IDS, dict(device='cpu'))
    run.claim(cfg.model_copy(update=dict(threads=4, device='cuda', data=cfg.out/'moved')), IDS, dict(device='cuda'))
    before = run.config.read_bytes()
    with pytest.raises(KdocrError) as e: run.claim(cfg.model_copy(update=dict(seed=7, lr=0.5)), dict(IDS, split_hash='s2'), dict(device='cpu'))
    assert 'lr is 0.003 there and 0.5 here' in str(e.value) and 'seed is 0 there and 7 here' in str(e.value) and "split_hash is 's1' there and 's2' here" in str(e.value)
    assert run.config.read_bytes() == before


def test_a_claim_that_died_half_way_is_made_again(cfg):
    run = RunFolder(cfg.out/cfg.name)
    run.claim(cfg, IDS, {})
    run.config.unlink() # env.json is written first, config.yaml makes it valid
    run.claim(cfg.model_copy(update=dict(lr=1.)), IDS, {})
    assert load_config(run.config).lr == 1.


def test_damaged_files_of_a_run_are_named(cfg):
    run = RunFolder(cfg.out/cfg.name)
    run.claim(cfg, IDS, {})
    run.env.write_text('{')
    with pytest.raises(KdocrError, match='env.json'): run.claim(cfg, IDS, {})
    run.env.write_text('{}')
    run.config.write_text('learning_rate: 1') # as a version of kdocr without schema_version wrote it
    with pytest.raises(KdocrError, match='config.yaml: no schema_version, needed is 2'): run.claim(cfg, IDS, {})
    run.config.write_text('schema_version: 2\nlearning_rate: 1')
    with pytest.raises(KdocrError, match='config.yaml: unknown key'): run.claim(cfg, IDS, {})


def test_log_forgets_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path/'metrics.jsonl')
    log.cut(0)
    log.add([dict(step=s, loss=0.1 * s) for s in range(1, 6)])
    with open(log.path, 'a') as f: f.write('{"step": 6')
    assert [r['step'] for r in log.rows()] == [1, 2, 3, 4, 5]
    log.cut(3)
    assert log.rows() == [dict(step=s, loss=0.1 * s) for s in (1, 2, 3)]


def test_scores_come_last(cfg, monkeypatch):
    run = RunFolder(cfg.out/cfg.name)
    preds = {'val': [Prediction('a', 'ABC1234', 'ABC1234', .9)]}
    def full(path, preds): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m, pytest.raises(KdocrError, match='No space left'):
        m.setattr(run_module, 'write_predictions', full)
        run.finish(preds)
    assert not run.finished
    run.finish(preds)
    assert run.finished and run.predictions('val') == preds['val']


def test_one_process_a_run(cfg):
    run = RunFolder(cfg.out/cfg.name)
    code = f"from kdocr.training.run_folder import RunFolder\nwith RunFolder(__import__('pathlib').Path({str(run.path)!r})).alone(): print('in', flush=True); input()"
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'in\n'
        with pytest.raises(KdocrError, match=f'another process is at work on this run .training, pid {other.pid} on '):
            with run.alone(): pass
        other.kill()
    save_checkpoint(run.last, about(1))
    (run.last.parent/'.last.pth.x.tmp').write_bytes(b'half') # it was killed while it saved
    with run.alone(): assert [p.name for p in run.last.parent.iterdir()] == ['last.pth'] # the system freed it
    assert DEFAULT_CHARS == cfg.charset
