"""Packs: whole or absent, made once by whoever comes first, and never believed without proof."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

import kdocr.data.pack
from conftest import annotate, write_track
from kdocr.cli import main
from kdocr.core import KdocrError
from kdocr.data.icpr import index_data
from kdocr.data.pack import PACK_VERSION, decode_track, _fingerprint, _open_pack, pack, pack_data

ARRAYS = ('lr', 'hr', 'degraded')


@pytest.fixture
def tracks(competition): return index_data(competition).train


@pytest.fixture
def many(competition):
    "A hundred and four tracks: as many as two processes begin to share."
    for i in range(92): shutil.copytree(competition/'train/Scenario-B/Mercosur/track_10002', competition/f'train/Scenario-B/Mercosur/track_{30000 + i}')
    return competition


def same_arrays(a, b): return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ARRAYS)
def folders(cache): return [f.name for f in Path(cache).iterdir() if f.is_dir()]


# ---------------------------------------------------------------- what is in one

def test_a_pack_holds_what_is_on_disk(tracks, tmp_path):
    p, faults = pack(tracks, tmp_path/'packs', n_degraded=2)
    arrays, heights = decode_track(tracks[4], 32, 128, n_degraded=2, seed=0)
    assert not faults and p.keys == [t.key for t in tracks] and p.texts == [t.text for t in tracks]
    assert all(np.array_equal(getattr(p, k)[4], arrays[k]) for k in ARRAYS)
    assert p.heights['lr'][4].tolist() == heights['lr'] == [17] * 5 and p.heights['hr'][4].tolist() == [30] * 5
    with pytest.raises(ValueError): p.lr[0] = 0
    for k in ARRAYS: assert np.array_equal(np.load(p.folder/f'{k}.npy'), getattr(p, k)), 'files that numpy reads too'


def test_the_bytes_are_the_same_for_any_number_of_processes(many, tmp_path):
    cut = many/'train/Scenario-B/Mercosur/track_30050/hr-002.jpg'
    os.truncate(cut, 300)
    found = index_data(many).train
    packs = [pack(found, tmp_path/str(w), n_degraded=2, workers=w) for w in (1, 2, 7)]
    for p, faults in packs:
        assert p.folder.name == packs[0][0].folder.name and faults == {'track_30050': f'{cut}: truncated JPEG'}
        assert sorted(f.name for f in p.folder.iterdir()) == ['degraded.npy', 'hr.npy', 'hr_heights.npy', 'index.json', 'lr.npy', 'lr_heights.npy']
        for file in p.folder.iterdir(): assert file.read_bytes() == (packs[0][0].folder/file.name).read_bytes()


def test_colour_is_rgb(tmp_path):
    folder = write_track(tmp_path/'red/train/track_00001', 'ABC1234', '.png')
    for f in folder.glob('*.png'): cv2.imwrite(str(f), np.full((30, 84, 3), (10, 30, 200), np.uint8)) # OpenCV writes BGR
    p, _ = pack(index_data(tmp_path/'red').train, tmp_path/'packs')
    assert p.hr[0, 0, 5, 5].tolist() == [200, 30, 10]


# ---------------------------------------------------------------- when it is made

def test_a_second_call_decodes_nothing(tracks, tmp_path, monkeypatch):
    first, _ = pack(tracks, tmp_path/'packs')
    monkeypatch.setattr(kdocr.data.pack, 'decode_track', None)
    monkeypatch.setattr(kdocr.data.pack, 'wait_lock', None) # so it can be read where nobody may write
    assert pack(tracks, tmp_path/'packs')[0].folder == first.folder


@pytest.mark.parametrize('change', ['picture', 'text', 'size', 'views', 'touched'])
def test_a_change_makes_another_pack(competition, tracks, tmp_path, change):
    cache, bright = tmp_path/'packs', np.full((17, 45, 3), 250, np.uint8)
    old, _ = pack(tracks, cache, n_degraded=1)
    how = dict(n_degraded=2 if change == 'views' else 1, height=48 if change == 'size' else 32)
    if change == 'picture': cv2.imwrite(str(tracks[3].lr[0]), bright)
    if change == 'text': annotate(tracks[3].folder, dict(plate_layout='Brazilian', plate_text='ZZZ9999'))
    if change == 'touched': os.utime(tracks[3].lr[0])
    new, _ = pack(index_data(competition).train, cache, **how)
    assert new.folder != old.folder
    if change == 'picture': assert new.lr[3, 0].min() > 240 and not old.folder.exists(), 'a stale one goes'
    if change == 'text': assert new.texts[3] == 'ZZZ9999'


def test_the_same_folder_by_another_path_is_the_same_pack(competition, tmp_path, monkeypatch):
    first, _ = pack(index_data(competition).train, tmp_path/'packs')
    monkeypatch.chdir(competition.parent)
    monkeypatch.setattr(kdocr.data.pack, 'decode_track', None)
    assert pack(index_data(competition.name).train, tmp_path/'packs')[0].folder == first.folder


def test_a_fingerprint_asks_the_disk_for_nothing(tracks, monkeypatch):
    before = _fingerprint(tracks)
    shutil.rmtree(tracks[0].folder)
    assert _fingerprint(tracks) == before


def test_a_picture_that_changes_while_it_is_packed_is_named(competition, tmp_path, monkeypatch):
    found, whole = index_data(competition).train, kdocr.data.pack.decode_track
    def slow(track, *how): # somebody writes a frame again after the index was made
        if track.key == 'track_10004': os.utime(track.hr[2], ns=(0, 0))
        return whole(track, *how)
    monkeypatch.setattr(kdocr.data.pack, 'decode_track', slow)
    with pytest.raises(KdocrError, match='track_10004/hr-003.jpg: changed since it was indexed'): pack(found, tmp_path/'packs')
    assert not folders(tmp_path/'packs')


@pytest.mark.parametrize('how', [dict(height=0), dict(width=-1), dict(n_degraded=-1)])
def test_sizes_that_are_none(tracks, tmp_path, how):
    with pytest.raises(KdocrError, match='a picture has a size'): pack(tracks, tmp_path/'packs', **how)


# ---------------------------------------------------------------- what is not believed

def as_type(file): # as many bytes, another meaning
    data = file.read_bytes()
    file.write_bytes(data[:128].replace(b"'|u1'", b"'|i1'") + data[128:])


def as_shape(file):
    data = file.read_bytes()
    file.write_bytes(data[:128].replace(b'32, 128', b'128, 32') + data[128:])


def edited(file, change):
    head, body, end = file.read_bytes().split(b'\n', 2)
    body = json.loads(body)
    change(body)
    file.write_bytes(b'\n'.join([head, json.dumps(body, separators=(',', ':')).encode(), end]))


HARMS = [
    ('hr.npy', lambda f: os.truncate(f, f.stat().st_size - 7), 'hr.npy: not the array that was written'),
    ('hr.npy', lambda f: f.write_bytes(f.read_bytes() + b'0'), 'hr.npy: not the array that was written'),
    ('hr.npy', lambda f: f.unlink(), 'hr.npy: missing'),
    ('hr.npy', as_type, 'hr.npy: not the array that was written'),
    ('hr.npy', as_shape, 'hr.npy: not the array that was written'),
    ('hr.npy', lambda f: f.write_bytes(b'\0' * f.stat().st_size), 'hr.npy: not the array that was written'),
    ('lr_heights.npy', lambda f: f.write_bytes(f.read_bytes().replace(b"'<i8'", b"'<f8'")), 'lr_heights.npy: not the array that was written'),
    ('index.json', lambda f: os.truncate(f, f.stat().st_size // 2), 'index.json: damaged'),
    ('index.json', lambda f: f.write_bytes(b''), 'index.json: damaged'),
    ('index.json', lambda f: f.write_text('{}'), 'index.json: damaged'),
    ('index.json', lambda f: f.write_text('[1, 2]\n\n}\n'), 'index.json: damaged'),
    ('index.json', lambda f: f.write_bytes(b'\xff\xfe\n\0\n\0'), 'index.json: damaged'),
    ('index.json', lambda f: edited(f, lambda body: body['texts'].reverse()), 'index.json: damaged'),
    ('index.json', lambda f: f.write_text(f.read_text().replace(f'"format": {PACK_VERSION}', f'"format": {PACK_VERSION + 1}')), 'index.json: damaged'),
    ('index.json', lambda f: f.unlink(), 'no pack')]


@pytest.mark.parametrize('name, harm, said', HARMS)
def test_a_pack_that_is_not_whole_is_refused_by_name_and_made_again(tracks, tmp_path, name, harm, said):
    good, _ = pack(tracks, tmp_path/'packs', n_degraded=1)
    pixels, texts = {k: np.array(getattr(good, k)) for k in ARRAYS}, list(good.texts)
    before = (good.folder/name).read_bytes()
    harm(good.folder/name)
    with pytest.raises(KdocrError, match=said) as e: _open_pack(good.folder)
    assert str(good.folder) in str(e.value)
    again, _ = pack(tracks, tmp_path/'packs', n_degraded=1)
    assert again.folder == good.folder and again.texts == texts and all(np.array_equal(getattr(again, k), pixels[k]) for k in ARRAYS)
    assert (good.folder/name).read_bytes() == before and folders(tmp_path/'packs') == [good.folder.name]


def test_a_pack_of_another_format_is_never_read(tracks, tmp_path, monkeypatch):
    monkeypatch.setattr(kdocr.data.pack, 'PACK_VERSION', PACK_VERSION - 1)
    old, _ = pack(tracks, tmp_path/'packs')
    monkeypatch.undo()
    with pytest.raises(KdocrError, match=f'index.json: made with format {PACK_VERSION - 1}, asked is {PACK_VERSION}'): _open_pack(old.folder)
    new, _ = pack(tracks, tmp_path/'packs')
    assert new.folder != old.folder and folders(tmp_path/'packs') == [new.folder.name], 'it goes, too'
    shutil.rmtree(new.folder)
    (new.folder.mkdir(), (new.folder/'index.json').write_text(json.dumps(dict(format=1, keys=[], bytes={})))) # as version 1 wrote it
    assert len(pack(tracks, tmp_path/'packs')[0]) == 12


def test_a_pack_of_other_data_is_never_read(competition, tracks, tmp_path):
    mine, _ = pack(tracks, tmp_path/'packs')
    cv2.imwrite(str(tracks[0].hr[0]), np.zeros((30, 84, 3), np.uint8))
    theirs, _ = pack(index_data(competition).train, tmp_path/'others')
    shutil.rmtree(mine.folder)
    shutil.copytree(theirs.folder, mine.folder) # whole, and by the right name
    assert _open_pack(mine.folder).hr[0, 0].max() == 0
    with pytest.raises(KdocrError, match='index.json: made with source'): _open_pack(mine.folder, source=_fingerprint(tracks))
    shutil.copytree(theirs.folder, (other := tmp_path/'packs'/theirs.folder.name.replace('32x128', '48x128')))
    with pytest.raises(KdocrError, match='made with height 32, asked is 48'): _open_pack(other, height=48)
    again, _ = pack(index_data(competition).train, tmp_path/'packs')
    assert again.hr[0, 0].max() == 0 and again.folder.name == theirs.folder.name and not mine.folder.exists()


def test_what_is_no_pack_is_refused_by_name(competition, tmp_path):
    for path in (competition, tmp_path/'nowhere', competition/'test_labels.csv'):
        with pytest.raises(KdocrError, match=f'{path}: no pack'): _open_pack(path)


# ---------------------------------------------------------------- interrupted, at once, without room

RUN = 'import sys, os, time, kdocr.data.pack as p\nfrom kdocr.data.icpr import index_data\n'


def start(code, *args):
    return subprocess.Popen([sys.executable, '-c', RUN + code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_leaves_nothing_half_read(competition, tracks, tmp_path):
    cache, stuck = tmp_path/'packs', '''
whole = p.decode_track
def decode(track, *a):
    if track.key == 'track_10007': print('half', flush=True); time.sleep(60)
    return whole(track, *a)
p.decode_track = decode
p.pack(index_data(sys.argv[1]).train, sys.argv[2], workers=1)'''
    with start(stuck, competition, cache) as killed:
        assert killed.stdout.readline() == 'half\n'
        killed.send_signal(signal.SIGKILL)
    [left] = folders(cache)
    assert left.startswith('.tmp-'), 'no pack by its real name'
    (cache/'.index.json.1234.tmp').touch() # a kill while that was written
    whole, faults = pack(tracks, cache)
    assert not faults and np.array_equal(whole.hr[11], decode_track(tracks[11], 32, 128, 0, 0)[0]['hr'])
    assert sorted(f.name for f in cache.iterdir()) == ['.lock', whole.folder.name], 'the orphans are swept away'


def test_an_interrupt_leaves_nothing(tracks, tmp_path, monkeypatch):
    whole = kdocr.data.pack.decode_track
    def impatient(track, *how):
        if track.key == 'track_10007': raise KeyboardInterrupt
        return whole(track, *how)
    monkeypatch.setattr(kdocr.data.pack, 'decode_track', impatient)
    with pytest.raises(KeyboardInterrupt): pack(tracks, tmp_path/'packs')
    assert not folders(tmp_path/'packs')


def children(pid): # processes that this one started
    def parent(stat): return int(stat.read_text().rpartition(')')[2].split()[1])
    out = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: out += [int(stat.parent.name)] * (parent(stat) == pid)
        except (FileNotFoundError, ProcessLookupError): pass
    return out


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError): return False


def until(true, seconds=60):
    for _ in range(20 * seconds):
        if true(): return True
        time.sleep(.05)


@pytest.mark.slow
@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_packs(many, tmp_path, sig):
    with start('p.pack(index_data(sys.argv[1]).train, sys.argv[2], n_degraded=200, workers=2)', many, tmp_path/'packs') as packing: # hours of work
        assert until(lambda: len(children(packing.pid)) == 2)
        theirs = children(packing.pid)
        file = lambda: next((tmp_path/'packs').glob('.tmp-*/hr_heights.npy'))
        assert until(lambda: list((tmp_path/'packs').glob('.tmp-*/hr_heights.npy')) and any(file().read_bytes()[128:])), 'they are at work'
        packing.send_signal(sig)
        assert until(lambda: not any(map(alive, (packing.pid, *theirs))))
    assert folders(tmp_path/'packs') == [] or sig == signal.SIGKILL
    p, _ = pack(index_data(many).train, tmp_path/'packs')
    assert folders(tmp_path/'packs') == [p.folder.name]


def test_two_processes_make_one_pack(competition, tracks, tmp_path):
    cache, both = tmp_path/'packs', '''
whole = p.decode_track
def decode(*a):
    print('decoded', flush=True)
    while not os.path.exists(sys.argv[3]): time.sleep(.01)
    return whole(*a)
p.decode_track = decode
print(p.pack(index_data(sys.argv[1]).train, sys.argv[2], workers=1)[0].hr.sum())'''
    first = start(both, competition, cache, tmp_path/'go')
    assert first.stdout.readline() == 'decoded\n'
    second = start(both, competition, cache, tmp_path/'go')
    assert second.stderr.readline() == f'{cache}: another process is at work here; waiting for it\n'
    (tmp_path/'go').touch()
    said = [p.communicate(timeout=60)[0].split() for p in (first, second)]
    expected = str(pack(tracks, cache)[0].hr.sum())
    assert said == [['decoded'] * 11 + [expected], [expected]], 'each track once, by the first'


def test_a_full_disk_is_told_before_the_work(tracks, tmp_path, monkeypatch):
    p, _ = pack(tracks, tmp_path/'packs', n_degraded=2)
    size = sum(f.stat().st_size for f in p.folder.iterdir())
    def free(n): monkeypatch.setattr(kdocr.data.pack.shutil, 'disk_usage', lambda path: SimpleNamespace(free=n))
    free(size)
    monkeypatch.setattr(kdocr.data.pack, 'decode_track', None)
    with pytest.raises(KdocrError, match=r'others: 12 packed tracks need 3\.\d MB, 2\.9 MB are free'): pack(tracks, tmp_path/'others', n_degraded=2)
    free(600_000)
    with pytest.raises(KdocrError, match='others: 12 packed tracks need 1.5 MB, 0.6 MB are free'): pack(tracks, tmp_path/'others')
    assert not folders(tmp_path/'others')
    monkeypatch.undo()
    free(int(1.01 * size))
    assert len(pack(tracks, tmp_path/'others', n_degraded=2)[0]) == 12, 'no more is asked for than is used'


def test_where_the_disk_is_memory_the_memory_counts(tmp_path, monkeypatch):
    mounts = [SimpleNamespace(mountpoint=str(p), fstype=kind) for p, kind in ((Path('/'), 'ext4'), (tmp_path.resolve(), 'tmpfs'))]
    monkeypatch.setattr(kdocr.data.pack.psutil, 'disk_partitions', lambda all: mounts)
    monkeypatch.setattr(kdocr.data.pack.psutil, 'virtual_memory', lambda: SimpleNamespace(available=5120))
    (tmp_path/'packs').mkdir()
    assert kdocr.data.pack._free(tmp_path/'packs') == 5120 and kdocr.data.pack._free(Path('/')) > 5120


FULL = '''
p._check_pack_space = lambda *a: None # as if others had filled the disk since
try: p.pack(index_data(sys.argv[1]).train, sys.argv[2], n_degraded=9, workers=int(sys.argv[3]))
except p.KdocrError as e: print(e)
print(sorted(f for f in os.listdir(sys.argv[2]) if f != '.lock'))
print(len(p.pack(index_data(sys.argv[1]).train[:20], sys.argv[2])[0]), 'fit')'''


@pytest.mark.parametrize('workers', [1, 2])
def test_a_disk_that_fills_up_in_the_middle(many, tmp_path, workers):
    (tmp_path/'disk').mkdir()
    r = subprocess.run(['unshare', '--mount', '--map-root-user', 'sh', '-c', f'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"', tmp_path/'disk',
                        sys.executable, '-c', RUN + FULL, many, tmp_path/'disk', str(workers)], capture_output=True, text=True)
    if 'unshare' in r.stderr or 'mount' in r.stderr: pytest.skip('this system lends no disk to fill')
    assert r.stdout.splitlines() == [f'{tmp_path}/disk: No space left on device; free some space there and give the same command again', '[]', '20 fit'], r.stderr


def test_a_write_that_fails_is_one_error_with_its_cure(tracks, tmp_path, monkeypatch):
    def refuse(code):
        def put(*a): raise OSError(code, os.strerror(code))
        monkeypatch.setattr(kdocr.data.pack, '_pack_track', put)
    for code, cure in ((errno.ENOSPC, 'free some space'), (errno.EDQUOT, 'free some space'), (errno.EROFS, 'a folder that you may write to'), (errno.EIO, 'error$')):
        refuse(code)
        with pytest.raises(KdocrError, match=f'packs: .*{cure}'): pack(tracks, tmp_path/'packs')
        assert not folders(tmp_path/'packs')
    (tmp_path/'file').touch()
    with pytest.raises(KdocrError, match='file'): pack(tracks, tmp_path/'file')


# ---------------------------------------------------------------- kdocr pack

def test_the_command_packs_what_training_looks_for(competition, capsys, monkeypatch, tmp_path):
    from kdocr.config import load_config
    from kdocr.data.batches import open_data
    assert main(['pack', str(competition), '--n-degraded', '1']) == 0
    train, test = capsys.readouterr().out.splitlines()
    assert train.startswith(f'train: {competition}/.kdocr/train-32x128-v1s0-') and ': 12 tracks, 2.2 MB, ' in train and train.endswith(' images/s')
    assert test.startswith(f'test: {competition}/.kdocr/test-32x128-v0s0-') and ': 3 tracks, 0.2 MB, ' in test
    monkeypatch.setattr(kdocr.data.pack, 'decode_track', None)
    data = open_data(load_config(out=tmp_path/'out', data=competition, val_frac=.25, batch_size=4, mode='student', distill_weight=0, student_input='mix', n_degraded=1))
    assert len(data.test) == 3 and len(data.train) + len(data.val) + len(data.split.left_out) == 12
    assert main(['pack', str(competition), '--n-degraded', '1', '--workers', '1']) == 0
    assert [line.endswith('it was there already') for line in capsys.readouterr().out.splitlines()] == [True, True]


def test_the_command_takes_a_folder_and_a_size(competition, tmp_path, capsys):
    (competition/'test_labels.csv').unlink() # a test part without texts is not packed
    [p] = pack_data(competition, tmp_path/'packs', height=48, width=96)
    assert p.lr.shape == (12, 5, 48, 96, 3) and p.folder.parent == tmp_path/'packs' and not (competition/'.kdocr').exists()
    assert capsys.readouterr().out.count('\n') == 1 and (tmp_path/'packs/index.json').is_file()


def test_faulty_files_are_one_error_that_lists_them(competition, capfd):
    cut, lost, late = (competition/f for f in ('train/Scenario-B/Brazilian/track_10001/hr-001.jpg', 'train/Scenario-A/Brazilian/track_00001/annotations.json', 'test/track_20001/lr-002.jpg'))
    os.truncate(cut, 300), lost.unlink(), os.truncate(late, 300)
    assert main(['pack', str(competition)]) == 2
    out, err = capfd.readouterr()
    assert '3 faults in the data' in err and all(f'{f}: ' in err for f in (cut, lost, late)) and '--skip-faulty' in err and 'Traceback' not in err
    assert main(['pack', str(competition), '--skip-faulty']) == 0
    assert '11 tracks, 1 of them faulty' in capfd.readouterr().out


@pytest.mark.parametrize('argv, said', [(['/nowhere'], '/nowhere: no such folder'), (['.', '--height', 'tall'], 'tall')])
def test_a_mistake_is_one_line(argv, said, capfd):
    assert main(['pack', *argv]) == 2
    assert said in (err := capfd.readouterr().err) and err.count('\n') == 1
