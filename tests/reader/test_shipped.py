"""The reader that ships: pictures from farther away, letters beyond the usual variety, the card, its run notebook, the peers beside it."""
import csv
from importlib.resources import files
from pathlib import Path
import cv2
import nbformat
import numpy as np
import pytest
import torch
from kdocr.data.augment import _LEAST, draw_lowres, apply_lowres
from kdocr.reader.heights import accuracy_by_height, labelled_folder, labelled_tracks, downscale
from kdocr.config import load_config
from kdocr.core import KdocrError, np_rng, read_json
from kdocr.data.batches import ICPR_LPR_Distill_Dataset, ICPR_LPR_HR_Dataset
from kdocr.data.degrade import track_conditions
from kdocr.data.icpr import index_data
from kdocr.jobs.notebooks import run_notebook
from kdocr.data.pack import pack
from kdocr.data.plates import _OTHER, VARIETY, draw_style, _stamp
from kdocr.reader.recogniser import Reader, shipped
from kdocr.training.run_folder import RunFolder
from kdocr.reader.model_card import card_text
from kdocr.data.synth import synth

MODEL = Path(str(files('kdocr')))/'assets'/'reader'/'reader.onnx'
PHOTOGRAPHS = Path(__file__).resolve().parents[2]/'shared/data/plates_br/test_crops'

def said(path): return ' '.join(str(o.get('text', o.get('ename', ''))) for c in nbformat.read(path, 4).cells if c.cell_type == 'code' for o in c.outputs)

@pytest.fixture(scope='module')
def drawn(tmp_path_factory): return synth(tmp_path_factory.mktemp('drawn')/'plates', tracks=24, test=0, seed=3, variety=1.)

@pytest.fixture
def crops(tmp_path):
    for i, (text, h) in enumerate([('ABC1234', 80), ('QVS2D10', 20)]):
        plate = np.full((h, 3*h, 3), 200, np.uint8)
        cv2.putText(plate, text, (2, int(.7*h)), cv2.FONT_HERSHEY_SIMPLEX, h/50, (20, 20, 20), max(1, h//25), cv2.LINE_AA)
        cv2.imwrite(str(tmp_path/f'{i}.png'), plate)
    (tmp_path/'labels.csv').write_text('file,text,layout\n0.png,ABC1234,Brazilian\n1.png,QVS2D10,Mercosur\n')
    return tmp_path


# ---- pictures from farther away
def test_shrink_leaves_alone_whom_it_should_and_is_each_tracks_own():
    x, g = torch.randint(256, (6, 2, 32, 128, 3), dtype=torch.uint8), torch.Generator().manual_seed(0)
    seeds = torch.tensor([0, 5, 0, 9, 5, 1])
    out = apply_lowres(x, seeds)
    assert torch.equal(out[[0, 2]], x[[0, 2]]) and not torch.equal(out[1], x[1])
    assert torch.equal(apply_lowres(x[3:5], seeds[3:5]), out[3:5]), "a part of a batch sees what the whole does"
    assert torch.equal(draw_lowres(50, 0., g), torch.zeros(50)) and (draw_lowres(50, 1., g) > 0).all()
    assert 60 < int((draw_lowres(200, .5, g) > 0).sum()) < 140

def test_shrink_takes_detail_and_keeps_the_mean():
    fine = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 1, 32, 128, 3)).astype(np.uint8))
    out = apply_lowres(fine, torch.arange(1, 41)).float()
    assert (out.std((1, 2, 3, 4)) < .8*fine.float().std((1, 2, 3, 4))).float().mean() > .6 # some are sharpened
    flat = torch.full((40, 1, 32, 128, 3), 120, dtype=torch.uint8)
    assert (apply_lowres(flat, torch.arange(1, 41)).float().mean((1, 2, 3, 4)) - 120).abs().max() < 2

def test_shrink_comes_down_to_the_least_height():
    "Rows that alternate below what the fewest pixels can hold are gone in some view, and there in none that has fewer rows than LEAST."
    bars = torch.from_numpy((np.arange(32) // 2 % 2 * 255).astype(np.uint8))[:, None, None].expand(32, 128, 3)[None, None].repeat(60, 1, 1, 1, 1)
    left = apply_lowres(bars, torch.arange(1, 61)).float().mean((1, 3, 4)).std(1) # contrast between the rows
    assert left.min() < 15 and left.max() > 60 and _LEAST == 9

def test_a_batch_is_the_same_in_parts_with_shrink_and_hr_mix_p(drawn, tmp_path):
    packed, _ = pack(index_data(drawn).train, tmp_path)
    make = lambda **how: ICPR_LPR_Distill_Dataset(packed, packed.keys, aug_strength=1., lowres_aug_p=.6, clean_hr_guided=False, **how)
    data, rows = make(hr_mix_p=.5), torch.arange(16)
    whole = data.batch(rows, step=4)
    assert torch.equal(whole.images[4:9], data.batch(rows, step=4, part=slice(4, 9)).images)
    assert whole.heights[4:9] == data.batch(rows, step=4, part=slice(4, 9)).heights
    assert {h > 25 for h in whole.heights} == {True, False}, 'HR frames and LR frames'
    assert all(h > 25 for h in make(hr_mix_p=1.).batch(rows).heights)
    assert max(make(hr_mix_p=1., train=False).batch(rows).heights) < 25, 'nothing random outside training'

def test_the_teachers_view_stays_near(drawn, tmp_path):
    packed, _ = pack(index_data(drawn).train, tmp_path)
    near, far = (ICPR_LPR_Distill_Dataset(packed, packed.keys, aug_strength=1., n_fixed_augs=1, lowres_aug_p=s) for s in (0., 1.))
    a, b = near.batch(torch.arange(8), 2), far.batch(torch.arange(8), 2)
    assert torch.equal(a.clean_hr, b.clean_hr) and not torch.equal(a.images, b.images)
    hr = ICPR_LPR_HR_Dataset(packed, packed.keys, lowres_aug_p=1.)
    assert not torch.equal(hr.batch(torch.arange(4)).images, ICPR_LPR_HR_Dataset(packed, packed.keys).batch(torch.arange(4)).images)


# ---- letters beyond the usual variety
def test_nothing_new_is_drawn_at_the_usual_variety():
    for v in (0., VARIETY): assert all(draw_style(np_rng(i), 'Brazilian', v).other == 0 and track_conditions(np_rng(i), 'Scenario-B', v).bloom == 0 for i in range(20))
    assert any(draw_style(np_rng(i), 'Brazilian', 1.).other > 0 for i in range(5)) and any(track_conditions(np_rng(i), 'Scenario-B', 1.).bloom > 0 for i in range(20))

def test_the_other_forms_are_other_forms():
    for c in _OTHER: assert not np.array_equal(_stamp(c, .6, 14, .2), _stamp(c, .6, 14, .2, True)), c
    assert np.array_equal(_stamp('H', .6, 14, .2), _stamp('H', .6, 14, .2, True))
    w = _stamp('W', .6, 14, .2, True)
    assert w[10:80, :8].min() > 0, "its sides stand upright"

def test_sets_of_two_drawings_are_told_apart(drawn):
    assert read_json(drawn/'synth.json')['drawing'] == '4.2'


# ---- the card
def test_labelled_folders_say_what_is_wrong(tmp_path, crops):
    assert [(p.key, p.text, p.layout, p.picture.shape) for p in labelled_folder(crops)] == [('0.png', 'ABC1234', 'Brazilian', (80, 240, 3)), ('1.png', 'QVS2D10', 'Mercosur', (20, 60, 3))]
    with pytest.raises(KdocrError, match='labels.csv: missing'): labelled_folder(tmp_path/'nowhere')
    for text in ('', 'name,text\n0.png,A\n', 'file,text\n'):
        (crops/'labels.csv').write_text(text)
        with pytest.raises(KdocrError, match='columns file and text'): labelled_folder(crops)
    (crops/'labels.csv').write_text('file,text\ngone.png,ABC1234\n')
    with pytest.raises(KdocrError, match='gone.png'): labelled_folder(crops)

def test_heights_and_scores(crops):
    plates, seen = labelled_folder(crops), []
    def read(pictures): seen.append([p.shape[:2] for p in pictures]); return [('ABC1234', 1.), ('QVS2D1', 1.)]
    rows = accuracy_by_height(read, plates, (None, 24, 12), 'mine')
    assert seen == [[(80, 240), (20, 60)], [(24, 72), (20, 60)], [(12, 36), (12, 36)]], 'never enlarged'
    assert [(r['reader'], r['height'], r['pictures'], r['exact']) for r in rows] == [('mine', h, 2, .5) for h in ('as stored', 24, 12)]
    assert rows[0]['cer'] == pytest.approx(1/14) and rows[0]['low'] < .5 < rows[0]['high']
    assert np.array_equal(downscale(plates[0].picture, 20), cv2.resize(plates[0].picture, (60, 20), interpolation=cv2.INTER_AREA))

def test_first_frames_of_tracks(drawn):
    tracks = index_data(drawn).train
    hr, lr = labelled_tracks(tracks), labelled_tracks(tracks, low=True)
    assert [p.text for p in hr] == [p.text for p in lr] == [t.text for t in tracks]
    assert all(a.picture.shape[0] > b.picture.shape[0] for a, b in zip(hr, lr))

def test_run_notebook_trains_measures_exports_and_writes_the_card(tmp_path, crops):
    out = tmp_path/'reader'
    run_notebook('reader', out, dict(out=out, tracks=40, steps=4, batch_size=8, eval_every=4, unseen=crops, publish=out/'card'))
    about, run = read_json(out/'card/reader.json'), RunFolder(out/'reader')
    assert about['data']['drawn'] and '40 tracks' in about['data']['source'] and about['recipe']['lowres_aug_p'] == load_config(run.config).lowres_aug_p
    assert [a['n'] for what, a in about['accuracy'].items() if what.startswith(f'photographs ({crops.name})')] == [2]*8, 'four heights, two ways'
    assert (out/'card/README.md').read_text() == card_text(about)
    pictures = [p.picture for p in labelled_folder(crops)]
    a, b = (Reader.load(p, device='cpu').read(pictures) for p in (run.best, out/'card/reader.onnx'))
    assert [r.text for r in a] == [r.text for r in b]

def test_peers_run_with_what_is_there(tmp_path, crops):
    kept = run_notebook('peers', tmp_path, dict(pictures=crops, embedded=50, rapidocr=False, tesseract=False, out=tmp_path))
    rows = list(csv.DictReader(open(tmp_path/'peers.csv'))) if (tmp_path/'peers.csv').exists() else []
    assert len(rows) == (24 if MODEL.is_file() else 0) and ('no reader came' in said(kept)) != MODEL.is_file()
    assert 'no labels.csv' in said(run_notebook('peers', tmp_path/'b', dict(pictures=tmp_path/'b', embedded=0, rapidocr=False, tesseract=False, out=tmp_path/'b')))


# ---- what ships
def test_the_shipped_reader_is_small_and_its_card_is_its_own():
    assert shipped() == MODEL and MODEL.stat().st_size <= 3_000_000
    about = read_json(MODEL.with_suffix('.json'))
    assert MODEL.with_name('README.md').read_text() == card_text(about)
    assert about['data']['drawn'] and about['model']['charset'] == Reader.load(device='cpu').about['charset']
    assert any('photographs' in what for what in about['accuracy'])

def test_the_shipped_reader_reads_drawn_plates(drawn):
    plates = labelled_tracks(index_data(drawn).train)
    read = [r.text for r in Reader.load(device='cpu', threads=1).read([p.picture for p in plates])]
    assert sum(a == p.text for a, p in zip(read, plates)) >= 12, 'half of 24 wild ones at least'

@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason='the photographs beside the project are not here')
def test_the_shipped_reader_reads_photographs():
    reader = Reader.load(device='cpu', threads=1)
    row, = accuracy_by_height(lambda x: [(r.text, r.confidence) for r in reader.read(x)], labelled_folder(PHOTOGRAPHS), (None,))
    assert row['exact'] >= .7
