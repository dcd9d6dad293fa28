"""The drawn set: one set for one seed whoever draws it, in the competition's layout, and no half-made folder."""
import csv, errno, json, shutil
from pathlib import Path
import cv2
import numpy as np
import pytest
from kdocr.charset import DEFAULT_CHARS, fits, layout_of
from kdocr.core import KdocrError, np_rng, read_json, write_json
from kdocr.data.degrade import degrade, spectrum
from kdocr.data.plates import _PEN, draw_plate, draw_text, font_set, mount, plate_corners, _stamp
from kdocr.data.synth import _plan_tracks, synth

TRACKS, TEST, SEED = 90, 30, 11

@pytest.fixture(scope='module')
def drawn(tmp_path_factory): return synth(tmp_path_factory.mktemp('synth')/'plates', TRACKS, TEST, SEED, workers=1)

def contents(root): return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}

def test_two_processes_draw_the_same_bytes(drawn, tmp_path):
    assert contents(synth(tmp_path/'two', TRACKS, TEST, SEED, workers=2)) == contents(drawn)

def test_another_seed_draws_other_plates(): assert not {j.text for j in _plan_tracks(200, 50, 0)} & {j.text for j in _plan_tracks(200, 50, 1)}

def test_variety_draws_the_same_texts_in_other_shapes(drawn, tmp_path):
    wild = synth(tmp_path/'wild', TRACKS, TEST, SEED, variety=1.)
    assert (wild/'test_labels.csv').read_bytes() == (drawn/'test_labels.csv').read_bytes()
    assert not set(contents(wild/'test').values()) & set(contents(drawn/'test').values())

def test_layout_on_disk(drawn):
    a, b = sorted(drawn.glob('train/Scenario-A/*/track_*')), sorted(drawn.glob('train/Scenario-B/*/track_*'))
    assert len(a) == len(b) == TRACKS//2
    layouts = [p.parent.name for p in a + b]
    assert set(layouts) == {'Brazilian', 'Mercosur'} and .3 < layouts.count('Mercosur')/TRACKS < .7
    for folder, ext in [(f, 'png') for f in a] + [(f, 'jpg') for f in b]:
        assert sorted(p.name for p in folder.iterdir()) == ['annotations.json'] + [f'{k}-00{i}.{ext}' for k in ('hr', 'lr') for i in range(1, 6)]
        note = read_json(folder/'annotations.json')
        assert fits(note['plate_text'], note['plate_layout']) and note['plate_layout'] == folder.parent.name
        assert len(note.get('corners') or ()) == (10 if ext == 'png' else 0)
    assert {'corners' in read_json(f/'annotations.json') for f in b} == {True, False}
    assert len({p.name for p in a + b}) == TRACKS

def test_test_part_is_flat_and_its_texts_are_new(drawn):
    rows = list(csv.DictReader((drawn/'test_labels.csv').open()))
    assert [r['track'] for r in rows] == sorted(p.name for p in drawn.glob('test/track_*')) and len(rows) == TEST
    assert all(layout_of(r['text']) == r['layout'] for r in rows)
    assert all(sorted(p.name for p in f.iterdir()) == [f'lr-00{i}.jpg' for i in range(1, 6)] for f in drawn.glob('test/track_*'))
    trained = [read_json(p)['plate_text'] for p in drawn.glob('train/*/*/*/annotations.json')]
    texts = trained + [r['text'] for r in rows]
    assert len(set(texts)) == len(texts)

def test_corners_lie_on_the_plate(drawn):
    for folder in list(drawn.glob('train/Scenario-A/*/track_*'))[:20]:
        for name, at in read_json(folder/'annotations.json')['corners'].items():
            h, w = cv2.imread(str(folder/name)).shape[:2]
            (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (at[k] for k in ('top-left', 'top-right', 'bottom-right', 'bottom-left'))
            assert x0 < x1 and x3 < x2 and y0 < y3 and y1 < y2
            assert min(x1 - x0, x2 - x3) > .6*w and min(y3 - y0, y2 - y1) > .4*h

def test_sizes_and_spectrum_of_real_frames(drawn):
    frames = {k: [cv2.imread(str(p), 0) for p in drawn.rglob(f'{k}-00*')] for k in ('lr', 'hr')}
    for kind, widths, heights in (('lr', (31, 55), (17, 23)), ('hr', (50, 115), (27, 42))):
        size = np.array([f.shape for f in frames[kind]])
        assert widths[0] <= size[:, 1].min() and size[:, 1].max() <= widths[1] and heights[0] <= size[:, 0].min() and size[:, 0].max() <= heights[1]
    shares = np.mean([list(spectrum(f).values()) for f in frames['lr']], 0)
    assert abs(shares[1] - .39) < .09 and abs(shares[2] - .19) < .05 and shares[3] < .15
    assert 78 < np.mean([f.std() for f in frames['lr']]) < 98

def test_finishes_an_interrupted_folder(drawn, tmp_path):
    root = shutil.copytree(drawn, tmp_path/'cut')
    for p in list(root.rglob('track_*'))[::3]: shutil.rmtree(p)
    (root/'.making'/'track_00001.1').mkdir(parents=True)
    (root/'test_labels.csv').unlink()
    write_json(root/'synth.json', {**read_json(root/'synth.json'), 'finished': False})
    assert contents(synth(root, TRACKS, TEST, SEED)) == contents(drawn)

def test_a_finished_folder_is_left_alone(drawn):
    before = {p: p.stat().st_mtime_ns for p in drawn.rglob('*')}
    synth(drawn, TRACKS, TEST, SEED)
    assert before == {p: p.stat().st_mtime_ns for p in drawn.rglob('*')}

def test_a_deleted_track_is_drawn_again(drawn, tmp_path):
    root = shutil.copytree(drawn, tmp_path/'hole')
    shutil.rmtree(next(root.glob('test/track_*')))
    assert contents(synth(root, TRACKS, TEST, SEED)) == contents(drawn)

def test_other_arguments_and_other_folders_are_refused(drawn, tmp_path):
    with pytest.raises(KdocrError, match=r'tracks 90, now 91'): synth(drawn, TRACKS + 1, TEST, SEED)
    with pytest.raises(KdocrError, match=r'variety 0.3, now 1.0'): synth(drawn, TRACKS, TEST, SEED, variety=1)
    with pytest.raises(KdocrError, match='between 0 and 1'): synth(tmp_path/'wild', 4, 0, 0, variety=-1)
    (tmp_path/'thesis.tex').touch()
    with pytest.raises(KdocrError, match='not empty, and not a drawn set'): synth(tmp_path, 4, 0, 0)
    (tmp_path/'file').touch()
    with pytest.raises(KdocrError, match='file'): synth(tmp_path/'file', 4, 0, 0)
    with pytest.raises(KdocrError, match='at least one track'): synth(tmp_path/'none', 0, 0, 0)

@pytest.mark.parametrize('workers', [1, 2])
def test_a_full_disk_names_the_folder_and_can_go_on(tmp_path, monkeypatch, workers):
    root = tmp_path/'plates'
    if workers == 1:
        write, left = Path.write_bytes, [25]
        def full(self, data):
            left[0] -= 1
            if left[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device', str(self))
            return write(self, data)
        monkeypatch.setattr(Path, 'write_bytes', full)
    else: # in other processes: something lies where a folder has to be
        root.mkdir(); (root/'train').touch(); (root/'synth.json').write_text(json.dumps(_asked()))
    with pytest.raises(KdocrError, match='plates.*(No space left|Not a directory|File exists)'): synth(root, 120, 0, 0, workers=workers)
    monkeypatch.undo()
    if workers == 2: (root/'train').unlink()
    assert len(list(synth(root, 120, 0, 0).glob('train/*/*/track_*'))) == 120

def _asked():
    from kdocr.core import digest
    from kdocr.data.plates import VARIETY
    from kdocr.data.synth import _DRAWING
    files = font_set()
    return dict(drawing=_DRAWING, tracks=120, test=0, seed=0, variety=VARIETY, fonts=digest(*[p.name for p in files], *files), finished=False)

def test_fonts_of_the_user(tmp_path):
    with pytest.raises(KdocrError, match='no .ttf or .otf'): font_set(tmp_path)
    shutil.copy(font_set()[0], tmp_path/'mine.ttf')
    assert font_set(tmp_path)[-1].name == 'mine.ttf'
    (tmp_path/'broken.ttf').write_bytes(font_set()[0].read_bytes()[:300])
    with pytest.raises(KdocrError, match='broken.ttf: not a usable font'): font_set(tmp_path)

def test_every_shipped_font_has_its_licence_beside_it():
    for p in font_set():
        family = 'roadgeek' if p.name.startswith('RG2014') else p.stem.rstrip('0123456789').rstrip('-').removesuffix('-narrow').removesuffix('-wide')
        assert 'icen' in (p.parent/f'LICENSE-{family}.txt').read_text()

def test_letters():
    assert set(_PEN) == set(DEFAULT_CHARS)
    masks = {c: cv2.resize(_stamp(c, .6, 14, .2), (50, 96)).tobytes() for c in DEFAULT_CHARS if c not in 'O0'}
    assert len(set(masks.values())) == 34
    assert cv2.countNonZero(_stamp('Q', .6, 14, .2)) > cv2.countNonZero(_stamp('O', .6, 14, .2))

def test_a_plate_depends_on_its_generator_alone():
    for layout in ('Brazilian', 'Mercosur'):
        a, b, c = (mount(draw_plate(draw_text(rng, layout), layout, rng), rng) for rng in map(np_rng, 'xxy'))
        assert (a == b).all() and not (a == c).all() and a.dtype == np.uint8
        assert plate_corners().max(0).tolist() < list(a.shape[1::-1])

def test_degrade_sizes_and_strength():
    hr = draw_plate('ABC1234', 'Brazilian', np_rng(0))
    hr = cv2.resize(hr, (80, 34), interpolation=cv2.INTER_AREA)
    low = degrade(hr, np_rng(1))
    assert low.dtype == np.uint8 and low.shape[0] < 23 and (low == degrade(hr, np_rng(1))).all()
    assert degrade(hr, np_rng(1), size=(40, 18)).shape == (18, 40, 3)
    assert not (degrade(hr, np_rng(1), size=(40, 18), strength=0.) == degrade(hr, np_rng(1), size=(40, 18))).all()
