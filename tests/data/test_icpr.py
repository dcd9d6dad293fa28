"""Data on disk: every way in which it may be written, every way in which it may be broken, and a split that no plate crosses."""
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import DAY, NIGHT, TEST, annotate, write_track
from kdocr.data import icpr
from kdocr.charset import Charset
from kdocr.cli import main
from kdocr.core import KdocrError, digest, read_sealed, write_sealed
from kdocr.data.check import check
from kdocr.data.icpr import Track, index_data, read_image
from kdocr.data.split import make_split, shared_split

A, B = 'train/Scenario-A', 'train/Scenario-B'


def named(faults): return sorted(f'{f.path}: {f.what}' for f in faults)


# ---------------------------------------------------------------- what is there
def test_both_scenarios_and_the_test_part(competition):
    found = index_data(competition)
    assert not found.faults
    assert Counter((t.scenario, t.layout) for t in found.train) == {('A', 'Brazilian'): 2, ('A', 'Mercosur'): 2, ('B', 'Brazilian'): 4, ('B', 'Mercosur'): 4}
    assert {t.text for t in found.train} == {*DAY, *NIGHT} and [t.text for t in found.test] == TEST
    assert all([p.name[:6] for p in t.lr] == [f'lr-00{i}' for i in range(1, 6)] for t in (*found.train, *found.test))
    assert all([p.name[:6] for p in t.hr] == [f'hr-00{i}' for i in range(1, 6)] for t in found.train)
    assert all(t.hr == () and t.scenario == 'B' for t in found.test)
    assert all(bool(t.corners) == (t.scenario == 'A') for t in found.train)
    assert len(found.pictures) == 12 * 10 + 3 * 5


def test_index_decodes_nothing(competition, monkeypatch):
    monkeypatch.setattr(icpr.cv2, 'imdecode', None)
    assert len(index_data(competition).train) == 12


@pytest.mark.parametrize('top', ['', 'wYe7pBJ7-train-1', 'a/b/LRLPR test data/unpacked'])
def test_varying_top_folders(competition, tmp_path, top):
    shutil.move(competition, tmp_path/'any'/top/'data')
    found = index_data(tmp_path/'any')
    assert (len(found.train), len(found.test), found.faults) == (12, 3, []) and found.test[0].text == TEST[0]


@pytest.mark.parametrize('part, train, test', [('train', 12, 0), ('test', 0, 3), (A, 4, 0), (f'{B}/Mercosur', 4, 0)])
def test_a_part_alone(competition, part, train, test):
    found = index_data(competition/part)
    assert (len(found.train), len(found.test), found.faults) == (train, test, [])
    assert {t.scenario for t in found.train} <= {'A', 'B'}
    assert all(t.text for t in found.test) # the labels stand beside the folder


def test_labels_inside_the_test_folder_or_absent(competition):
    shutil.move(competition/'test_labels.csv', competition/'test')
    assert [t.text for t in index_data(competition).test] == TEST
    (competition/'test/test_labels.csv').unlink()
    assert [t.text for t in index_data(competition).test] == [None] * 3


@pytest.mark.parametrize('about, text, scenario', [
    ({'plate_text': 'NEW1A23', 'plate_layout': 'Mercosur', 'corners': {'lr-001.png': {}}}, 'NEW1A23', 'A'),
    ([{'plate_text': 'NEW1A23', 'corners': {}}, {'plate_text': 'OTH1234'}], 'NEW1A23', 'B'),
    ({'license_plate': 'NEW1A23', 'corners': []}, 'NEW1A23', 'B'),
    ({'text': ' NEW1A23 ', 'layout': 'Mercosur', 'corners': None}, 'NEW1A23', 'B')])
def test_annotations_as_they_were_met_in_the_wild(tmp_path, about, text, scenario):
    annotate(write_track(tmp_path/'train/track_1', text, '.png'), about) # no folder tells scenario or layout
    [t] = index_data(tmp_path).train
    assert (t.text, t.layout, t.scenario) == (text, 'Mercosur', scenario)


def test_pictures_are_rgb_and_of_both_formats(competition, tmp_path):
    import cv2
    red = np.zeros((16, 40, 3), np.uint8); red[..., 2] = 250 # OpenCV writes BGR
    for name in ('red.png', 'red.jpg', 'grey.png'):
        cv2.imwrite(str(tmp_path/name), red[..., 2] if name == 'grey.png' else red)
        im = read_image(tmp_path/name)
        assert im.shape == (16, 40, 3) and im.dtype == np.uint8 and im.flags['C_CONTIGUOUS'] and im[..., 0].min() > 240
    assert read_image(tmp_path/'red.jpg')[..., 2].max() < 10


# ---------------------------------------------------------------- what is broken
def test_no_data(tmp_path):
    for path, said in ((tmp_path/'nowhere', 'nowhere: no such folder'), (tmp_path/'nowhere.csv', 'nowhere.csv: no such file'), (tmp_path, 'no tracks in it')):
        with pytest.raises(KdocrError, match=said): index_data(path)
        with pytest.raises(KdocrError, match=str(path)): check(path)
    (tmp_path/'file').touch()
    with pytest.raises(KdocrError, match='file: neither a folder nor a .csv file'): index_data(tmp_path/'file')


def break_annotations(about): return lambda f: annotate(f, about)
def cut(name, size): return lambda f: (f/name).write_bytes((f/name).read_bytes()[:size])


def flip(folder):
    data = bytearray((folder/'hr-002.png').read_bytes())
    data[len(data) // 2] ^= 0xff
    (folder/'hr-002.png').write_bytes(data)


DAYLIGHT, DARK = f'{A}/Brazilian/track_00001', f'{B}/Brazilian/track_10001'
BROKEN = [ # track, what is done to it, the file that is named, what is said, whether the index alone sees it
    (DAYLIGHT, lambda f: (f/'annotations.json').unlink(), 'annotations.json', 'no such file', True),
    (DAYLIGHT, break_annotations('{"plate_text": "AVL52'), 'annotations.json', 'not valid JSON', True),
    (DAYLIGHT, lambda f: (f/'annotations.json').write_bytes(b'\xff\xfe\0'), 'annotations.json', 'not valid JSON', True),
    (DAYLIGHT, break_annotations('[]'), 'annotations.json', 'neither an object nor a list', True),
    (DAYLIGHT, break_annotations({'plate_layout': 'Brazilian'}), 'annotations.json', 'no text under plate_text', True),
    (DAYLIGHT, break_annotations({'plate_text': '  '}), 'annotations.json', 'no text under plate_text', True),
    (DAYLIGHT, break_annotations({'plate_text': 5215}), 'annotations.json', 'no text under plate_text', True),
    (DAYLIGHT, lambda f: (f/'lr-003.png').unlink(), 'lr-003.png', 'missing', True),
    (DARK, lambda f: (f/'hr-005.jpg').unlink(), 'hr-005.jpg', 'missing', True),
    (DARK, lambda f: [p.unlink() for p in f.glob('hr*')], '', 'no HR frames', True),
    (DARK, lambda f: shutil.copy(f/'lr-001.jpg', f/'lr-001.png'), 'lr-001.png', 'also there as lr-001.jpg', True),
    (DARK, lambda f: (f/'hr-001.jpg').write_bytes(b''), 'hr-001.jpg', 'empty file', True),
    ('test/track_20001', lambda f: (f/'lr-002.jpg').unlink(), 'lr-002.jpg', 'missing', True),
    (DARK, cut('hr-001.jpg', 600), 'hr-001.jpg', 'truncated JPEG', False),
    (DARK, cut('lr-004.jpg', -1), 'lr-004.jpg', 'truncated JPEG', False),
    (DAYLIGHT, cut('hr-001.png', 200), 'hr-001.png', 'truncated PNG', False),
    (DAYLIGHT, cut('lr-001.png', -4), 'lr-001.png', 'truncated PNG', False),
    (DAYLIGHT, flip, 'hr-002.png', 'damaged PNG', False),
    (DAYLIGHT, lambda f: (f/'hr-002.png').write_text('<html>404</html>'), 'hr-002.png', 'neither PNG nor JPEG', False),
    (DARK, lambda f: (f/'hr-002.jpg').write_bytes(b'\xff\xd8 nothing \xff\xd9'), 'hr-002.jpg', 'cannot be decoded', False),
    (DAYLIGHT, break_annotations({'plate_text': 'AVL-5215', 'plate_layout': 'Brazilian'}), 'annotations.json', "'-' is not in the charset", False),
    (DAYLIGHT, break_annotations({'plate_text': 'avl5215', 'plate_layout': 'Brazilian'}), 'annotations.json', "'a' is not in the charset", False),
    (DAYLIGHT, break_annotations({'plate_text': 'BRA2E19', 'plate_layout': 'Brazilian'}), 'annotations.json', 'does not fit the layout Brazilian', False),
    (DAYLIGHT, break_annotations({'plate_text': 'AVL5215', 'plate_layout': 'Brasilian'}), 'annotations.json', "did you mean 'Brazilian'?", False)]


@pytest.mark.parametrize('track, harm, file, said, at_once', BROKEN, ids=lambda x: x if isinstance(x, str) else None)
def test_a_fault_is_named_by_its_path(competition, track, harm, file, said, at_once, capfd):
    harm(competition/track)
    found, report = index_data(competition), check(competition)
    [line] = named(report.faults)
    assert line.startswith(f'{competition/track/file}: ') and said in line and line in capfd.readouterr().out
    assert named(found.faults) == [line] * at_once
    assert len(found.train) + len(found.test) == 15 - at_once # the others go on


def test_faults_do_not_hide_each_other(competition, capfd):
    (competition/DAYLIGHT/'annotations.json').unlink()
    cut('hr-002.png', 100)(competition/DAYLIGHT)
    (competition/DAYLIGHT/'lr-001.png').unlink()
    (competition/DARK/'lr-001.jpg').write_bytes(b'')
    cut('lr-002.jpg', 100)(competition/DARK)
    assert main(['check', str(competition)]) == 1
    out = capfd.readouterr().out
    assert '5 faults:' in out and all(f'{competition/f}: ' in out for f in (f'{DAYLIGHT}/annotations.json', f'{DAYLIGHT}/hr-002.png', f'{DAYLIGHT}/lr-001.png', f'{DARK}/lr-001.jpg', f'{DARK}/lr-002.jpg'))


def test_a_doubled_name_and_a_link_that_leads_nowhere(competition):
    twin = write_track(competition/f'{B}/Mercosur/track_00001', 'NEW1A23', '.jpg')
    (competition/DARK/'lr-001.jpg').unlink()
    (competition/DARK/'lr-001.jpg').symlink_to('nowhere.jpg')
    assert named(index_data(competition).faults) == sorted([f'{twin}: a second track of this name; the first is {competition/DAYLIGHT}', f'{competition/DARK}/lr-001.jpg: missing'])


@pytest.mark.parametrize('data, said', [(b'key,plate\n1,2\n', 'no column text nor track'), (b'', 'no column'), (b'track,text\n\xff\xfe,1\n', 'codec')])
def test_labels_that_cannot_be_read(competition, data, said):
    (competition/'test_labels.csv').write_bytes(data)
    [fault] = index_data(competition).faults
    assert fault.path == competition/'test_labels.csv' and said in fault.what


def test_report_of_sound_data(competition, capfd):
    report = check(competition)
    assert not report.faults and capfd.readouterr().out == f'{report}\n'
    assert all(s in str(report) for s in ('12 training tracks, 3 test tracks (3 with a text), 135 pictures', '45 / 45 / 45 x 17 / 17 / 17', '84 / 84 / 84 x 30 / 30 / 30', 'text lengths: 7 (15 tracks)', '0 faults'))
    assert main(['check', str(competition)]) == 0
    write_track(competition/f'{B}/Brazilian/track_10020', DAY[0], '.jpg')
    assert f'1 of them on more than one: {DAY[0]} (2)' in str(check(competition))
    assert len(check(competition, Charset('0123456789')).faults) == 16 # every plate has letters


# ---------------------------------------------------------------- what is kept of it
def opened(monkeypatch):
    "The annotations that are opened from here on."
    seen, read = [], icpr.annotation
    monkeypatch.setattr(icpr, 'annotation', lambda path: (seen.append(path), read(path))[1])
    return seen


def test_a_kept_index_is_the_same_and_opens_no_annotation(competition, tmp_path, monkeypatch):
    plain, first = index_data(competition), index_data(competition, tmp_path/'cache')
    seen = opened(monkeypatch)
    assert index_data(competition, tmp_path/'cache') == first == plain and plain.train[0].corners and not seen
    assert index_data(competition, str(tmp_path/'cache')).train[0].stamps == plain.train[0].stamps and not seen


def test_it_does_not_matter_where_the_folder_is_mounted(competition, tmp_path, monkeypatch):
    first, here = index_data(competition, tmp_path/'cache'), os.getcwd()
    shutil.move(competition, tmp_path/'elsewhere')
    seen = opened(monkeypatch)
    moved = index_data(tmp_path/'elsewhere', tmp_path/'cache')
    monkeypatch.chdir(tmp_path)
    near = index_data('elsewhere', 'cache')
    assert not seen and moved.root == tmp_path/'elsewhere' and moved.train[0].lr[0].is_file() and near.test[0].lr[0].is_file()
    assert [t.corners for t in moved.train] == [t.corners for t in near.train] == [t.corners for t in first.train]
    assert moved.fingerprint == near.fingerprint == first.fingerprint


def test_a_folder_that_changes_its_part_with_its_name(tmp_path):
    for name in ('train', 'test'): # flat: only the top's name tells the part
        (at := tmp_path/name).mkdir() if name == 'train' else shutil.move(tmp_path/'train', at := tmp_path/name)
        if name == 'train': write_track(at/'track_1', 'NEW1A23', '.png')
        assert index_data(at, tmp_path/'cache') == index_data(at)


CHANGES = {
    'a text corrected, as long as before': lambda r: annotate(r/DARK, {'plate_text': 'CDE1284', 'plate_layout': 'Brazilian'}),
    'a layout corrected': lambda r: annotate(r/DARK, {'plate_text': 'CDE1234', 'plate_layout': 'Mercosur'}),
    'a text in place, the time put back by a second': lambda r: (annotate(r/DARK, {'plate_text': 'CDE1284'}), os.utime(r/DARK/'annotations.json', ns=(0, time.time_ns() - 10**9))),
    'an annotation gone': lambda r: (r/DARK/'annotations.json').unlink(),
    'an annotation broken': lambda r: annotate(r/DARK, '{'),
    'a frame replaced': lambda r: shutil.copy(r/DARK/'hr-001.jpg', r/DARK/'hr-002.jpg'),
    'a frame touched': lambda r: os.utime(r/DARK/'lr-001.jpg'),
    'a frame emptied': lambda r: (r/DARK/'lr-001.jpg').write_bytes(b''),
    'a frame gone': lambda r: (r/DARK/'lr-001.jpg').unlink(),
    'a frame more': lambda r: shutil.copy(r/DARK/'lr-001.jpg', r/DARK/'lr-001.png'),
    'a track gone': lambda r: shutil.rmtree(r/DARK),
    'a track more': lambda r: write_track(r/B/'Mercosur/track_00777', 'NEW1A23', '.jpg'),
    'a track renamed': lambda r: (r/DARK).rename(r/B/'Brazilian/track_00778'),
    'two annotations changed places': lambda r: [(r/DARK/'annotations.json').rename(r/'a'), (r/DAYLIGHT/'annotations.json').rename(r/DARK/'annotations.json'), (r/'a').rename(r/DAYLIGHT/'annotations.json')],
    'a label corrected': lambda r: (r/'test_labels.csv').write_text((r/'test_labels.csv').read_text().replace('STU5V67', 'STU5V68')),
    'the labels gone': lambda r: (r/'test_labels.csv').unlink()}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_whatever_changed_is_noticed(competition, tmp_path, change):
    before = index_data(competition, tmp_path/'cache')
    change(competition)
    after = index_data(competition)
    assert index_data(competition, tmp_path/'cache') == after != before
    assert index_data(competition, tmp_path/'cache') == after, 'and kept'


def reseal(file, **head): write_sealed(file, read_sealed(file), **{**json.loads(file.read_text().split('\n')[0] + '0}')['head'], **head})


@pytest.mark.parametrize('harm', [
    lambda f: f.write_bytes(b''), lambda f: f.write_bytes(f.read_bytes()[:-5]), lambda f: f.write_bytes(f.read_bytes()[:200]), lambda f: f.write_text('{}'),
    lambda f: f.write_text('[1]\n[2]\n}\n'), lambda f: f.write_bytes(b'\xff\0\n\n'), lambda f: f.write_text(f.read_text().replace('AVL5215', 'AVL5216')),
    lambda f: f.write_text(f.read_text().replace('"format": 1', '"format": 2')), lambda f: reseal(f, format=0), lambda f: reseal(f, walk='0' * 16),
    lambda f: (f.unlink(), f.symlink_to('nowhere')), lambda f: f.unlink()])
def test_a_kept_index_that_is_not_ours_is_read_anew_and_written_again(competition, tmp_path, harm, monkeypatch):
    plain, file = index_data(competition, tmp_path/'cache'), tmp_path/'cache/index.json'
    good = file.read_bytes()
    harm(file)
    seen = opened(monkeypatch)
    assert index_data(competition, tmp_path/'cache') == plain and len(seen) == 12
    assert file.read_bytes() == good and [f.name for f in file.parent.iterdir()] == ['index.json']


def test_a_fault_is_never_kept(competition, tmp_path, monkeypatch):
    annotate(competition/DARK, '{')
    index_data(competition, tmp_path/'cache')
    seen = opened(monkeypatch)
    assert [f.path for f in index_data(competition, tmp_path/'cache').faults] == seen == [competition/DARK/'annotations.json']


@pytest.mark.parametrize('why', ['forbidden', 'full', 'a file is in its place'])
def test_a_cache_that_cannot_be_written(competition, tmp_path, monkeypatch, why):
    cache, plain = tmp_path/'file'/'cache', index_data(competition)
    if why == 'a file is in its place': (tmp_path/'file').touch()
    else:
        def refuse(*a, **kw): raise OSError(13 if why == 'forbidden' else 28, why)
        monkeypatch.setattr(icpr, 'write_sealed', refuse)
    assert index_data(competition, cache) == plain and not cache.exists()


def test_files_that_changed_just_now_rest_before_they_are_read(competition, tmp_path, monkeypatch):
    naps = []
    monkeypatch.setattr(icpr.time, 'sleep', naps.append)
    for old in (True, False):
        for f in competition.rglob('*.*'): os.utime(f, ns=(0, time.time_ns() - 10**9 * old))
        index_data(competition, tmp_path/'cache')
    os.utime(f, ns=(0, time.time_ns() + 10**12)) # a clock that is wrong
    index_data(competition, tmp_path/'cache')
    index_data(competition, tmp_path/'cache')
    assert len(naps) == 3 and naps[0] == 0 < naps[1] <= .02 == naps[2]


def by_asking(found): return digest([[t.key, t.text, *([p.name, p.stat().st_size] for p in (*t.lr, *t.hr))] for t in (*found.train, *found.test)])


def test_the_fingerprint_of_the_data(competition, tmp_path):
    found = index_data(competition)
    assert found.fingerprint == by_asking(found) == index_data(competition, tmp_path).fingerprint
    for f in competition.rglob('*.*'): os.utime(f)
    assert index_data(competition).fingerprint == found.fingerprint, 'times are no part of it'
    (competition/'test_labels.csv').unlink()
    annotate(competition/DARK, {'plate_text': "it's \u00fc\ud800\n"})
    odd = index_data(competition)
    assert odd.fingerprint == by_asking(odd) != found.fingerprint
    (competition/DARK/'lr-001.jpg').unlink()
    fewer = index_data(competition)
    assert len(fewer.train) == 11 and fewer.fingerprint == by_asking(fewer) != odd.fingerprint


# ---------------------------------------------------------------- the split
def tracks(n=400, texts=150, seed=0):
    "Tracks that are on no disk: texts repeat, and cross the scenarios."
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        k = int(rng.integers(texts))
        layout = 'Mercosur' if k % 3 else 'Brazilian'
        out.append(Track(f'track_{i:05d}', f'ABC{k % 10}{"D" if k % 3 else 1}{k // 10:02d}', layout, 'AB'[i % 2], Path(f'/data/{i}'), (), ()))
    return out


def test_no_text_is_on_both_sides():
    all_of, test_texts = tracks(), {'ABC0101', 'ABC1D10'}
    split, of = make_split(all_of, 0.1, 0, test_texts), {t.key: t for t in all_of}
    texts = {p: {of[k].text for k in getattr(split, p)} for p in ('train', 'val')}
    assert not texts['train'] & texts['val'] and not (texts['train'] | texts['val']) & test_texts
    assert sorted((*split.train, *split.val, *split.left_out)) == sorted(of)
    assert {of[k].scenario for k in split.val} == {'B'}
    assert {of[k].text for k in split.left_out} <= texts['val'] | test_texts
    assert any(of[k].scenario == 'A' and of[k].text in texts['val'] for k in split.left_out)


def test_share_and_strata():
    all_of = tracks(4000, 1500)
    split, of = make_split(all_of, 0.1), {t.key: t for t in all_of}
    for layout in ('Brazilian', 'Mercosur'):
        pool = [t for t in all_of if t.scenario == 'B' and t.layout == layout]
        val = [k for k in split.val if of[k].layout == layout]
        assert abs(len(val) / len(pool) - 0.1) < 0.01


def test_without_scenario_b_the_rest_gives():
    day = [t for t in tracks() if t.scenario == 'A']
    split = make_split(day, 0.2)
    assert split.val and not split.left_out and len(split.train) + len(split.val) == len(day)


def test_the_hash_knows_contents_and_nothing_else():
    all_of = tracks()
    elsewhere = [Track(t.key, t.text, t.layout, t.scenario, Path('/mnt/other'), (), ()) for t in all_of[::-1]]
    split = make_split(all_of)
    assert make_split(elsewhere) == split
    assert split.hash == 'cf6bf4152f95691c' # golden: another value refuses every teacher made before
    assert make_split(all_of, seed=1).hash != split.hash != make_split(tracks(seed=1)).hash


def test_too_few_texts():
    with pytest.raises(KdocrError, match='4 tracks with 1 different texts are too few to split'):
        make_split([Track(f'track_{i}', 'ABC1D23', 'Mercosur', 'B', Path(), (), ()) for i in range(4)])


def test_saved_once_and_shared(competition, tmp_path):
    found = index_data(competition).train
    split = shared_split(competition, found, 0.25, 0)
    assert (competition/'split.json').is_file() and not (tmp_path/'out').exists()
    assert shared_split(competition, found[::-1], 0.25, 7) == split
    assert index_data(competition).train == found # our file is no track


def edited(path, change):
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize('harm, said', [
    (lambda p: p.write_text('{'), 'not valid JSON'), (lambda p: p.write_text('[]'), 'do not fit its hash'), (lambda p: p.write_text('{"train": 3}'), 'do not fit its hash'),
    (lambda p: edited(p, lambda s: s['train'].update(s['val'])), 'do not fit its hash'), (lambda p: edited(p, lambda s: s.pop('left_out')), 'do not fit its hash'),
    (lambda p: edited(p, lambda s: s.update(val_frac=0.5)), 'made with val_frac 0.5, asked is 0.25')])
def test_a_damaged_split_is_refused_by_name(competition, tmp_path, harm, said):
    found = index_data(competition).train
    shared_split(competition, found, 0.25, 0)
    harm(competition/'split.json')
    with pytest.raises(KdocrError, match='split.json') as e: shared_split(competition, found, 0.25, 0)
    assert said in str(e.value)


def test_data_that_changed_after_the_split(competition, tmp_path):
    found = index_data(competition).train
    split = shared_split(competition, found, 0.25, 0)
    gone = shared_split(competition, [t for t in found if t.key != split.train[0]], 0.25, 0)
    assert (gone.train, gone.val, gone.hash) == (split.train[1:], split.val, split.hash)
    with pytest.raises(KdocrError, match='plates of the test part: 1, the first is track_10001'): shared_split(competition, found, 0.25, 0, {NIGHT[0]})
    annotate(competition/DARK, {'plate_text': 'CDE1284'})
    with pytest.raises(KdocrError, match='track_10001: CDE1234 is now CDE1284'): shared_split(competition, index_data(competition).train, 0.25, 0)
    write_track(competition/f'{B}/Mercosur/track_10030', 'NEW1A23', '.jpg')
    with pytest.raises(KdocrError, match='tracks came after it was made: 1, the first is track_10030. Delete the file'): shared_split(competition, index_data(competition).train, 0.25, 0)


REAL = Path(__file__).resolve().parent.parent.parent.parent/'shared/data/plates_br'


@pytest.mark.skipif(not REAL.is_dir(), reason='the photographed plates are not beside the project')
def test_the_photographed_plates():
    found = index_data(REAL)
    assert (len(found.train), len(found.test), found.faults) == (912, 226, [])
    split = make_split(found.train, 0.1, 0, {t.text for t in found.test})
    assert 55 <= len(split.val) <= 70
