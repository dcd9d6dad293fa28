"""The teacher's taps, computed once: what is taken is what was said, and nothing half-made or foreign is ever read."""
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kdocr.tapcache
from kdocr.core import KdocrError
from kdocr.tapcache import open_taps, tap_cache
from kdocr.taps import TapOut

KEY = dict(teacher='a1b2', tracks='c3d4')


def teacher(rows, views):
    "Says its view's number in every value, times a third."
    x = (100. * rows + views)[:, None, None].expand(-1, 4, 3) / 3
    return TapOut(x, {'backbone_out': -x[:, :, :2]})


def make(folder, key=KEY, compute=teacher, n=20, views=3, **kw): return tap_cache(folder, key, n, views, compute, batch=16, **kw)


def never(rows, views): raise AssertionError('computed again')


def test_what_is_taken_is_what_was_said_to_half_precision(tmp_path):
    cache = make(tmp_path)
    rows, views = torch.tensor([19, 0, 7, 7]), torch.tensor([2, 1, 0, 2])
    for kept in (cache, make(tmp_path, compute=never)):
        out, live = kept.take(rows, views), teacher(rows, views)
        assert out.logits.dtype == torch.float32 and set(out.taps) == {'backbone_out'}
        assert ((out.logits - live.logits).abs() <= 2**-11 * live.logits.abs()).all()
        assert torch.equal(out.taps['backbone_out'], live.taps['backbone_out'].half().float())
    assert cache.nbytes == 20 * 3 * 4 * (3 + 2) * 2


def test_another_key_is_another_cache(tmp_path):
    first, second = make(tmp_path), make(tmp_path, dict(KEY, teacher='e5f6'))
    assert first.folder != second.folder and make(tmp_path, compute=never).folder == first.folder


@pytest.mark.parametrize('harm', ['array cut short', 'array gone', 'array of another type', 'array of another shape', 'about gone', 'about cut short', 'other format', 'other key'])
def test_a_cache_that_is_not_whole_is_made_again(tmp_path, harm):
    good = make(tmp_path)
    array, about = good.folder/'logits.npy', good.folder/'about.json'
    if harm == 'array cut short': os.truncate(array, array.stat().st_size - 2)
    elif harm == 'array gone': array.unlink()
    elif harm == 'array of another type': np.save(array, np.zeros((60, 4, 3), np.int16))
    elif harm == 'array of another shape': np.save(array, np.zeros((60, 3, 4), np.float16))
    elif harm == 'about gone': about.unlink()
    elif harm == 'about cut short': about.write_text(about.read_text()[:40])
    elif harm == 'other format': about.write_text(about.read_text().replace('"format": 1', '"format": 9'))
    else: about.write_text(about.read_text().replace('"key": "', '"key": "0'))
    assert open_taps(good.folder, KEY) is None
    assert make(tmp_path).take(torch.tensor([19]), torch.tensor([2])).logits[0, 0, 0] == torch.tensor(1902 / 3).half()


@pytest.mark.parametrize('value', [7e4, float('inf'), float('nan')])
def test_what_half_precision_cannot_hold_is_refused_by_name(tmp_path, value):
    def loud(rows, views): return TapOut(torch.where(rows == 5, value, 1.)[:, None, None].expand(-1, 4, 3), {})
    with pytest.raises(KdocrError, match="tap 'logits' of track number 5: .*teacher_cache: off"): make(tmp_path, compute=loud)
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]


def test_too_little_disk_is_said_before_the_work(tmp_path, monkeypatch):
    asked = []
    def counting(rows, views): asked.append(len(rows)); return teacher(rows, views)
    monkeypatch.setattr(kdocr.tapcache.shutil, 'disk_usage', lambda p: SimpleNamespace(free=1000))
    with pytest.raises(KdocrError, match='60 views need 0.00 GB, 0.00 GB are free; fewer geometry_views, or teacher_cache: off'): make(tmp_path, compute=counting)
    assert asked == [16], 'one batch, which told the shapes'
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]


SCRIPT = '''
import sys, time, torch
from pathlib import Path
from kdocr.tapcache import tap_cache
from kdocr.taps import TapOut
def compute(rows, views):
    print('computed', flush=True)
    if sys.argv[2] == 'stuck' and rows[0] > 8: print('half', flush=True); time.sleep(60)
    time.sleep(.05)
    x = (100. * rows + views)[:, None, None].expand(-1, 4, 3) / 3
    return TapOut(x, {'backbone_out': -x[:, :, :2]})
tap_cache(Path(sys.argv[1]), dict(teacher='a1b2', tracks='c3d4'), 20, 3, compute, batch=16)
'''


def start(folder, how): return subprocess.Popen([sys.executable, '-c', SCRIPT, str(folder), how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_a_kill_leaves_nothing_that_is_read(tmp_path):
    with start(tmp_path, 'stuck') as p:
        while p.stdout.readline() != 'half\n': assert p.poll() is None
        p.send_signal(signal.SIGKILL)
    assert [f.name[:5] for f in tmp_path.iterdir() if f.is_dir()] == ['.tmp-']
    cache = make(tmp_path)
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == [cache.folder.name], 'the orphan is swept away'


def test_two_processes_compute_once(tmp_path):
    said = [p.communicate(timeout=60)[0] for p in [start(tmp_path, 'go') for _ in range(2)]]
    assert sorted(s.count('computed') for s in said) == [0, 4]
    make(tmp_path, compute=never)
