"""Photographs and drawn plates: the CSV by which the run notebook lists them, what stays apart in it, and what is learnt from it."""
import csv
from pathlib import Path

import cv2
import nbformat
import numpy as np
import pytest
import torch

from kdocr.config import load_config
from kdocr.core import KdocrError
from kdocr.data.batches import open_data
from kdocr.reader.heights import DECODE_MODES, labelled_folder, downscale
from kdocr.data.check import check
from kdocr.data.icpr import index_data, read_image
from kdocr.data.split import make_split
from kdocr.jobs.notebooks import run_notebook
from kdocr.reader.recogniser import Reader, shipped
from kdocr.data.synth import synth

TEXTS = ['ABC1234', 'QVS2D10', 'KDO4C26', 'ABC1234', 'RIO2A18', 'XYZ0001']
PHOTOGRAPHS = Path(__file__).resolve().parents[2]/'shared/data/plates_br'


NOTEBOOK, CODE = Path(__file__).resolve().parents[2]/'nbs/runs/reader.ipynb', dict(out=None)
for cell in nbformat.read(NOTEBOOK, 4).cells: # its imports and its functions
    if cell.cell_type == 'code' and ('use_style' in cell.source or 'def mixed_csv' in cell.source): exec(cell.source, CODE)
_LOW, plates_of = CODE['LOW'], CODE['plates_of']


def mixed_csv(file, photographs, drawn=(), **how): return CODE['mixed_csv'](file, photographs, drawn, **how)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory): return synth(tmp_path_factory.mktemp('d')/'drawn plates', tracks=8, test=4, seed=3)


@pytest.fixture
def crops(tmp_path):
    "Six crops of five plates, one of them lower than some LR heights; names with spaces and other letters."
    folder = tmp_path/'Größe, Fotos'
    folder.mkdir()
    for i, t in enumerate(TEXTS):
        h = 18 if i == 5 else 80
        plate = cv2.putText(np.full((80, 240, 3), 190, np.uint8), t, (4, 55), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (30, 30, 30), 3, cv2.LINE_AA)
        cv2.imwrite(str(folder/f'é {i}.png'), cv2.resize(plate, (3*h, h), interpolation=cv2.INTER_AREA))
    (folder/'labels.csv').write_text('file,text,layout\n' + ''.join(f'é {i}.png,{t},{"Brazilian" if t[4].isdigit() else "Mercosur"}\n' for i, t in enumerate(TEXTS)), encoding='utf-8')
    return folder


def by_key(found): return {t.key: t for t in found.train}


def test_everything_is_listed_where_it_lies(tmp_path, crops, drawn):
    listing = mixed_csv(tmp_path/'lists'/'mixed.csv', [crops, drawn], [drawn], copies=2)
    found = index_data(listing)
    assert not found.faults and not found.test, 'the test part of a folder is left alone'
    assert len(found.train) == 2*6 + 2*8 + 8 and sorted({t.scenario for t in found.train}) == ['drawn', 'photographed']
    tracks, own = by_key(found), {t.key: t for t in index_data(drawn).train}
    assert tracks['0/é 1.png'].text == 'QVS2D10' and tracks['0/é 1.png'].layout == 'Mercosur'
    assert [p.resolve() for p in tracks['0/é 1.png (2)'].hr] == [(crops/'é 1.png').resolve()]*5
    for k, t in own.items(): # the same plates, once as photographs, once as drawn
        for key in (f'1/{k}', f'1/{k} (2)', f'2/{k}'):
            assert (tracks[key].text, [p.resolve() for p in (*tracks[key].hr, *tracks[key].lr)]) == (t.text, [p.resolve() for p in (*t.hr, *t.lr)])
    assert not (tmp_path/'lists/mixed.kdocr/low-1').exists(), 'tracks have LR frames of their own'
    assert not check(listing).faults


def test_lr_frames_of_a_crop(tmp_path, crops):
    plates = {key: frames for key, _, _, frames in plates_of(crops, tmp_path/'low')}
    near, low = read_image(crops/'é 0.png'), [read_image(f) for _, f in plates['é 0.png']]
    assert [x.shape[0] for x in low] == [*_LOW] and {f for f, _ in plates['é 0.png']} == {crops/'é 0.png'}
    for x, h in zip(low, _LOW): assert np.array_equal(x, downscale(near, h))
    assert [read_image(f).shape[0] for _, f in plates['é 5.png']] == [18, 18, 16, 14, 12], 'never enlarged'
    found = {t.key: t for t in index_data(mixed_csv(tmp_path/'m.csv', [crops], copies=3)).train}
    assert found['0/é 0.png'].lr == found['0/é 0.png (2)'].lr == found['0/é 0.png (3)'].lr, 'copies are the same files'


def test_a_plate_is_on_one_side_of_the_split(tmp_path, crops, drawn):
    "Also where the drawn part happens to show a photographed plate."
    also = tmp_path/'also'
    also.mkdir()
    (also/'labels.csv').write_text('file,text\n"../Größe, Fotos/é 0.png",ABC1234\n', encoding='utf-8')
    for seed in range(4):
        found = index_data(mixed_csv(tmp_path/f'{seed}.csv', [crops], [also, drawn], copies=2, val_frac=.5, seed=seed))
        split, tracks = make_split(found.train, named=found.val), by_key(found)
        texts = lambda keys: {tracks[k].text for k in keys}
        assert len(texts(split.val)) == 3 and not texts(split.val) & texts(split.train)
        assert all(tracks[k].scenario == 'photographed' and not k.endswith(')') for k in split.val), 'photographs validate, each once'
        assert texts(split.left_out) <= texts(split.val) and len(split.left_out) >= len(split.val)
        assert ('ABC1234' in texts(split.val)) == any(k.startswith('1/') for k in split.left_out)
        assert len(split.train) + len(split.val) + len(split.left_out) == 2*6 + 1 + 8
    assert {p.name for p in tmp_path.iterdir()} == {'also', crops.name, *(f'{s}{e}' for s in range(4) for e in ('.csv', '.kdocr'))}, 'nothing is written elsewhere'
    assert len({tuple(sorted(index_data(tmp_path/f'{s}.csv').val)) for s in range(4)}) > 1, 'the seed draws'


def test_the_trainer_obeys_the_list(tmp_path, crops, drawn):
    listing = mixed_csv(tmp_path/'m.csv', [crops], [drawn], copies=2, val_frac=.3)
    data = open_data(load_config('reader', data=listing, out=tmp_path, val_frac=.3))
    assert {*data.val.keys} == index_data(listing).val and data.test is None
    assert not {*data.val.texts} & {*data.train.texts} and data.train.batch(torch.arange(4), 0).images.shape == (4, 1, 3, 32, 128)


def test_the_same_again_changes_no_file(tmp_path, crops, drawn):
    def stamps(): return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob('*.*') if p.is_file()}
    mixed_csv(tmp_path/'m.csv', [crops], [drawn])
    before = stamps()
    mixed_csv(tmp_path/'m.csv', [crops], [drawn])
    assert stamps() == before and len(before) > 6*5
    low = tmp_path/'m.kdocr/low-0/00000-0-12.png'
    low.write_bytes(low.read_bytes()[:50])
    mixed_csv(tmp_path/'m.csv', [crops], [drawn])
    assert read_image(low).shape[0] == 12, 'what was damaged is made anew'


def test_it_can_be_moved_with_its_folders(tmp_path, crops, drawn):
    listing = mixed_csv(crops/'m.csv', [crops])
    assert not any(r['hr'].startswith('/') or r['lr'].startswith('/') for r in csv.DictReader(open(listing, encoding='utf-8')))
    found = index_data((crops.rename(tmp_path/'moved'))/'m.csv')
    assert not found.faults and len(found.train) == 18


def test_what_is_refused(tmp_path, crops, drawn):
    def said(what, *args, **how):
        with pytest.raises(KdocrError, match=what): mixed_csv(tmp_path/'x.csv', *args, **how)
        assert not (tmp_path/'x.csv').exists()
    said('nowhere: no such folder', [tmp_path/'nowhere'])
    said('copies 0', [crops], copies=0)
    said('val_frac 1', [crops], val_frac=1)
    said('no training tracks', [drawn/'test'])
    (crops/'é 2.png').unlink()
    said('é 2.png', [crops])
    (crops/'labels.csv').write_text('picture,text\n')
    said('columns file and text', [crops])


def test_a_folder_with_faults_is_named(tmp_path, crops):
    bad = synth(tmp_path/'bad', tracks=3, test=0, seed=9)
    index_data(bad).train[0].hr[2].unlink()
    with pytest.raises(KdocrError, match=r'bad: 1 faults, the first: .*hr-003.*missing; kdocr check'): mixed_csv(tmp_path/'x.csv', [crops], [bad])


def test_the_run_notebook_small(tmp_path, crops):
    kept = run_notebook('reader', tmp_path/'out'/'mine', dict(out=str(tmp_path/'out'), name='mine', photographs=[str(crops)], tracks=8, steps=3, batch_size=4, val_frac=.3, unseen=str(crops)))
    said = ' '.join(str(o.get('text', '')) for c in nbformat.read(kept, 4).cells if c.cell_type == 'code' for o in c.outputs)
    assert 'photographed    18' in said and 'drawn            8' in said
    with open(tmp_path/'out/mine/heights.csv') as f: rows = list(csv.DictReader(f))
    assert {(r['decoder'], r['height']) for r in rows} == {(d, h) for d in DECODE_MODES for h in ('as stored', '24', '16', '12')}
    assert {r['pictures'] for r in rows if r['set'].startswith('photographs (')} == {'6'}
    assert (tmp_path/'out/mine/checkpoints/best.pth').is_file() and (tmp_path/'out/mine/figures/readings.png').is_file()


def rows_of(path): return list(csv.DictReader(open(path, encoding='utf-8')))


def test_unseen_counts_what_is_read(tmp_path, crops, drawn):
    run_notebook('unseen', tmp_path/'out', dict(out=str(tmp_path/'out'), checkpoints=[str(shipped())]*2, pictures=str(crops), tracks=str(drawn)))
    reader, plates, tracks = Reader.load(), labelled_folder(crops), index_data(drawn).test
    for row in rows_of(tmp_path/'out/unseen_heights.csv'):
        h = None if row['height'] == 'as stored' else int(row['height'])
        right = [r.text == p.text for r, p in zip(reader.read([downscale(p.picture, h) for p in plates], **DECODE_MODES[row['decoder']]), plates)]
        assert {float(row[k]) for k in ('mean', 'least', 'most', 'seed 0', 'seed 1')} == {100*np.mean(right)} and row['n'] == '6'
    for row in (rows := rows_of(tmp_path/'out/unseen_frames.csv')):
        if 'five' in row['frames'] and 'any' not in row['frames']: got = reader.read([list(t.lr) for t in tracks], **DECODE_MODES[row['decoder']], frames=row['frames'].split()[0])
        else: got = reader.read([[f] for t in tracks for f in (t.lr if 'any' in row['frames'] else t.lr[:1])], **DECODE_MODES[row['decoder']])
        texts = np.repeat([t.text for t in tracks], len(got)//len(tracks))
        assert float(row['mean']) == pytest.approx(100*np.mean([r.text == t for r, t in zip(got, texts)]))
    rate = {(r['decoder'], r['frames']): float(r['mean']) for r in rows}
    for row in rows_of(tmp_path/'out/unseen_gains.csv'):
        b, a = row['what'].split(' against ')
        assert float(row['points']) == pytest.approx(rate[row['decoder'], b] - rate[row['decoder'], a]) and float(row['low']) <= float(row['points']) <= float(row['high'])
    assert (tmp_path/'out/figures/unseen.png').is_file()
    said = ' '.join(str(o.get('text', '')) for c in nbformat.read(tmp_path/'out/unseen.ipynb', 4).cells if c.cell_type == 'code' for o in c.outputs)
    n = 2*(4*6 + (3 + 5)*4) # seeds * (heights of crops + one, sum, vote and five single frames of tracks)
    assert f'{n} of {n} constrained readings are valid plates' in said


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason='the photographs are not here')
def test_no_plate_of_the_photographed_test_part_is_in_its_training_part():
    seen = {r['text'] for r in csv.DictReader(open(PHOTOGRAPHS/'train_crops/labels.csv'))} | {t.text for t in index_data(PHOTOGRAPHS).train}
    assert not seen & {r['text'] for r in csv.DictReader(open(PHOTOGRAPHS/'test_crops/labels.csv'))} and len(seen) > 400
