"""From files to batches: packs that are whole or absent, batches that depend on their step alone, one geometry for both resolutions."""
import json
import os
from collections import Counter

import cv2
import numpy as np
import pytest
import torch

import kdocr.data.batches
from kdocr.data.augment import draw_geometry, warp
from kdocr.config import load_config
from kdocr.core import KdocrError
from kdocr.data.batches import (ICPR_LPR_Distill_Dataset, ICPR_LPR_HR_Dataset, NotFixed, count_views, open_data,
                                rows_of, to_device_memory, teacher_view)
from kdocr.data.icpr import index_data
from kdocr.data.pack import Pack

CPU = torch.device('cpu')


def texts(n): return [f'{chr(65 + i % 26)}BC{i:04d}' for i in range(n)]


def write_picture(path, rng, h, w, colour=None):
    image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8) if colour is None else np.full((h, w, 3), colour, np.uint8)
    cv2.imwrite(str(path), image[..., ::-1])


def write_track(root, i, text, test=False, ext='jpg', colour=None):
    "A track of noise; a layout of Scenario-B, or of the flat test part."
    rng, place = np.random.default_rng(i), root/'test' if test else root/'train'/'Scenario-B'/'Brazilian'
    folder = place/f'track_{i:05d}'
    folder.mkdir(parents=True)
    for n in range(1, 6):
        write_picture(folder/f'lr-{n:03d}.{ext}', rng, 16, 40, colour)
        if not test: write_picture(folder/f'hr-{n:03d}.{ext}', rng, 30, 80, colour)
    if not test: (folder/'annotations.json').write_text(json.dumps(dict(plate_layout='Brazilian', plate_text=text, corners={})))
    return folder


@pytest.fixture
def plates(tmp_path):
    "Twelve tracks of Scenario-B with twelve texts, and three test tracks with theirs."
    root = tmp_path/'plates'
    for i, text in enumerate(texts(15)): write_track(root, i, text, test=i >= 12)
    (root/'test_labels.csv').write_text('track,text,layout\n' + ''.join(f'track_{i:05d},{texts(15)[i]},Brazilian\n' for i in (12, 13, 14)))
    return root


@pytest.fixture
def tracks(plates): return index_data(plates).train


def small(tmp_path, plates, **values): return load_config(**{**dict(out=tmp_path/'out', data=plates, val_frac=.25, batch_size=4), **values})


def by_hand(n, lr, hr, degraded=None):
    "A pack in memory."
    heights = {k: np.arange(n)[:, None].repeat(5, 1) + base for k, base in (('lr', 10), ('hr', 100))}
    return Pack('in memory', [f't{i}' for i in range(n)], texts(n), ['Brazilian'] * n, ['B'] * n, heights, lr, hr, degraded, {})


def numbered(n=12, n_degraded=2):
    "Every frame is one grey level that tells its track and frame: LR 5i+f, HR 60+5i+f, degraded 120+5i+f."
    level = (np.arange(5 * n).reshape(n, 5)).astype(np.uint8)[..., None, None, None] # (n,5,1,1,1)
    level = np.broadcast_to(level, (n, 5, 32, 128, 3))
    return by_hand(n, level, level + 60, np.stack([level + 120] * n_degraded, 1))


def grey(images): return (images[:, :, 0, 0, 0] * 127.5 + 127.5).round().int() # (b,f)


# ---------------------------------------------------------------- geometry

POINTS = np.array([(x, y) for y in (11.25, 20.5) for x in (24.5, 44.25, 64.75, 84.5, 103.25)]) # pixels


def blobs(points=POINTS, h=32, w=128):
    "Round spots at sub-pixel places, (h,w) in [0,1]."
    y, x = np.mgrid[:h, :w]
    return sum(np.exp(-((x - px)**2 + (y - py)**2) / (2 * 1.2**2)) for px, py in points)


def centres(image, near, reach=4):
    "Centres of gravity of spots, looked for around `near`; (k,2) pixels."
    y, x = np.mgrid[:image.shape[0], :image.shape[1]]
    out = []
    for px, py in near:
        ink = image * ((abs(x - px) <= reach) & (abs(y - py) <= reach))
        out.append(((ink * x).sum() / ink.sum(), (ink * y).sum() / ink.sum()))
    return np.array(out)


def through(theta, points, h=32, w=128):
    "Where the map shows pixels of the input: the inverse of `theta`, which looks from output to input."
    n = np.column_stack(((2 * points[:, 0] + 1) / w - 1, (2 * points[:, 1] + 1) / h - 1, np.ones(len(points))))
    at = n @ np.linalg.inv(theta.numpy().astype(float)).T
    at = at[:, :2] / at[:, 2:]
    return np.column_stack((((at[:, 0] + 1) * w - 1) / 2, ((at[:, 1] + 1) * h - 1) / 2))


def test_warp_puts_pixels_where_theta_says():
    theta = draw_geometry(20, 1., torch.Generator().manual_seed(0))
    spots = torch.tensor(np.rint(255 * blobs())).to(torch.uint8)[..., None].expand(20, 1, 32, 128, 3)
    seen = warp(theta, spots)[0][:, 0, :, :, 0].numpy() / 255
    for t, image in zip(theta, seen):
        expected = through(t, POINTS)
        inside = (expected > 5).all(1) & (expected[:, 0] < 122) & (expected[:, 1] < 26)
        assert inside.sum() >= 2
        assert abs(centres(image, expected) - expected)[inside].max() < .1


def test_student_and_teacher_see_one_geometry_and_the_student_a_light_of_its_own():
    spots = np.broadcast_to(blobs()[None, None, ..., None], (16, 5, 32, 128, 3))
    pack = by_hand(16, (60 + 90 * spots).round().astype(np.uint8), (20 + 200 * spots).round().astype(np.uint8)) # two cameras, one plate
    batch = ICPR_LPR_Distill_Dataset(pack, pack.keys, frames=2, aug_strength=1., seed=3).batch(torch.arange(16), 5, CPU)
    moved, light = [], []
    for s, t in zip(batch.images.mean(2).flatten(0, 1).numpy(), batch.clean_hr.mean(2).flatten(0, 1).numpy()):
        ink = abs(s - np.median(s))
        near = np.argwhere((t == cv2.dilate(t, np.ones((9, 9)))) & (t > .2))[:, ::-1]
        near = near[(near > 5).all(1) & (near[:, 0] < 122) & (near[:, 1] < 26)]
        apart = centres(ink, near) - centres(t - t.min(), near)
        assert len(near) >= 2 and abs(apart).max() < .05, 'pixels'
        moved.append(min(np.hypot(*(POINTS - near[0]).T))); light.append(np.median(s))
    assert max(moved) > 2 and np.std(light) > .05
    assert abs(np.array([np.median(t) for t in batch.clean_hr.numpy()]) - (20 / 127.5 - 1)).max() < .01, 'the teacher keeps its light'


def test_no_strength_no_change():
    pack = numbered()
    plain = ICPR_LPR_Distill_Dataset(pack, pack.keys, train=False).batch(torch.arange(12), 0, CPU)
    off = ICPR_LPR_Distill_Dataset(pack, pack.keys, aug_strength=1., train=False).batch(torch.arange(12), 9, CPU)
    assert torch.equal(plain.images, off.images) and torch.equal(plain.clean_hr, off.clean_hr)


# ---------------------------------------------------------------- batches

def test_a_batch_is_a_function_of_rows_seed_and_step():
    pack = numbered()
    def make(seed=0): return ICPR_LPR_Distill_Dataset(pack, pack.keys, frames=3, aug_strength=1., seed=seed, student_input='mix')
    rows = torch.tensor([7, 0, 3, 3])
    first, other = make().batch(rows, 11, CPU), make()
    for step in (4, 12): other.batch(rows, step, CPU)
    torch.manual_seed(99); torch.rand(5)
    again = other.batch(rows, 11, CPU)
    assert torch.equal(first.images, again.images) and torch.equal(first.clean_hr, again.clean_hr)
    assert (first.keys, first.texts, first.heights) == (again.keys, again.texts, again.heights)
    for different in (make().batch(rows, 12, CPU), make(seed=1).batch(rows, 11, CPU)): assert not torch.equal(first.images, different.images)


def test_rows_need_no_state_and_every_epoch_holds_every_track_once():
    steps = [rows_of(s, 10, 4, seed=0) for s in range(25)]
    seen = torch.cat(steps)
    for epoch in seen.view(10, 10): assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(e.tolist()) for e in seen.view(10, 10)}) > 5, 'epochs differ'
    assert all(torch.equal(rows_of(s, 10, 4, seed=0), steps[s]) for s in (24, 3, 17)), 'in any order'
    assert not torch.equal(rows_of(0, 10, 4, seed=1), steps[0])
    assert rows_of(0, 3, 64, seed=0).shape == (64,), 'a batch may be larger than an epoch'


def test_training_draws_distinct_frames_and_pairs_them_by_number():
    pack = numbered()
    data = ICPR_LPR_Distill_Dataset(pack, pack.keys, frames=3)
    seen = set()
    for step in range(8):
        b = data.batch(torch.arange(12), step, CPU)
        lr, hr = grey(b.images), grey(b.clean_hr)
        assert torch.equal(hr, lr + 60) and all(len(set(r)) == 3 for r in lr.tolist())
        assert torch.equal(lr // 5, torch.arange(12)[:, None].expand(12, 3))
        seen |= set((lr % 5).flatten().tolist())
    assert seen == {0, 1, 2, 3, 4}
    val = ICPR_LPR_Distill_Dataset(pack, pack.keys, frames=3, train=False).batch(torch.arange(12), 7, CPU)
    assert grey(val.images).remainder(5).tolist() == [[0, 1, 2]] * 12


@pytest.mark.parametrize('how, share', [('lr', 0.), ('degraded', 1.), ('mix', .25)])
def test_a_degraded_input_is_a_copy_of_the_very_frame_that_the_teacher_sees(how, share):
    pack = numbered()
    data = ICPR_LPR_Distill_Dataset(pack, pack.keys, student_input=how, degraded_frac=.25)
    ours = [(grey(b.images) - grey(b.clean_hr)).flatten().tolist() for b in (data.batch(torch.arange(12), s, CPU) for s in range(20))]
    count = Counter(sum(ours, []))
    assert set(count) <= {-60, 60} and abs(count[60] / 240 - share) < .08


def test_the_key_and_the_height_travel_with_the_picture():
    pack = numbered()
    b = ICPR_LPR_HR_Dataset(pack, ['t7', 't2', 't9']).batch(torch.tensor([2, 0]), 0, CPU)
    assert (b.keys, b.texts, b.heights, len(b)) == (['t9', 't7'], [texts(10)[9], texts(10)[7]], [109, 107], 2)
    assert b.images.shape == (2, 1, 3, 32, 128) and b.clean_hr is None
    assert -1 <= b.images.min() and b.images.max() <= 1
    one = ICPR_LPR_HR_Dataset(pack, ['t7', 't2', 't9'])[-1]
    assert one.keys == ['t9'] and len(one) == 1


def test_joined_plates_have_new_texts_and_one_cut_for_student_and_teacher():
    noise = np.random.default_rng(0).integers(0, 256, (2, 12, 5, 32, 128, 3), dtype=np.uint8)
    pack = by_hand(12, *noise)
    def batch(share, step=3, **kw): return ICPR_LPR_Distill_Dataset(pack, pack.keys, frames=2, recombine_p=share, **kw).batch(torch.arange(12), step, CPU)
    plain, joined = batch(0.), batch(1.)
    text = dict(zip(plain.keys, plain.texts))
    for i, (key, said) in enumerate(zip(joined.keys, joined.texts)):
        left, _, right = key.partition('+')
        assert left == plain.keys[i] and said == text[left][:3] + text[right or left][3:]
        columns = [(getattr(joined, k)[i] != getattr(plain, k)[i]).any(0).any(0).any(0) for k in ('images', 'clean_hr')] # (128,)
        assert torch.equal(*columns), 'one cut'
        if right != '' and right != left: assert 50 < columns[0].int().argmax() < 62 and columns[0][64:].all()
    assert sum('+' in k for k in joined.keys) >= 10 and not any('+' in k for k in plain.keys)
    assert torch.equal(joined.images, batch(1.).images) and batch(1., train=False).keys == plain.keys


def test_a_batch_without_a_teacher_is_a_standard_one():
    b = ICPR_LPR_Distill_Dataset(numbered(), ['t0'], aug_strength=1., clean_hr_guided=False).batch(torch.tensor([0]), 0, CPU)
    assert b.clean_hr is None and b.images.shape == (1, 1, 3, 32, 128)


def test_what_cannot_be_served_is_refused_by_name():
    full = numbered()
    bare = by_hand(12, full.lr, None)
    def refused(match): return pytest.raises(KdocrError, match=match)
    with refused('no HR frames'): ICPR_LPR_HR_Dataset(bare, bare.keys)
    with refused('clean_hr_guided: false'): ICPR_LPR_Distill_Dataset(bare, bare.keys)
    with refused("n_degraded"): ICPR_LPR_Distill_Dataset(by_hand(12, full.lr, full.hr), full.keys, student_input='mix')
    with refused('known: lr, degraded, mix'): ICPR_LPR_Distill_Dataset(full, full.keys, student_input='low')
    with refused('frames: 6'): ICPR_LPR_HR_Dataset(full, full.keys, frames=6)


# ---------------------------------------------------------------- the whole of it

def test_teacher_and_student_share_one_split_without_a_common_text(plates, tmp_path):
    teacher = open_data(small(tmp_path, plates))
    student = open_data(small(tmp_path, plates, mode='student', distill_weight=0, seed=5))
    assert teacher.split == student.split and teacher.fingerprint == student.fingerprint
    assert (type(teacher.val), type(student.val)) == (ICPR_LPR_HR_Dataset, ICPR_LPR_Distill_Dataset)
    parts = [set(d.texts) for d in (student.train, student.val, student.test)]
    assert all(parts) and not parts[0] & parts[1] and not parts[2] & (parts[0] | parts[1])
    assert teacher.val.keys == student.val.keys and len(student.test) == 3


def test_a_plate_of_the_test_part_is_never_trained_on(plates, tmp_path):
    write_track(plates, 77, texts(15)[13])
    data = open_data(small(tmp_path, plates))
    assert 'track_00077' in data.split.left_out and 'track_00077' not in data.train.keys + data.val.keys


def test_every_faulty_picture_is_named_in_one_error_and_can_be_left_out(plates, tracks, tmp_path):
    cut, gone, lost = tracks[1].hr[2], tracks[4].lr[0], tracks[8].folder/'annotations.json'
    os.truncate(cut, cut.stat().st_size // 2)
    gone.write_bytes(b'')
    lost.write_text('{"plate_text": ')
    with pytest.raises(KdocrError) as e: open_data(small(tmp_path, plates))
    for path in (cut, gone, lost): assert str(path) in str(e.value)
    assert 'kdocr check' in str(e.value) and 'skip_faulty' in str(e.value)
    data = open_data(small(tmp_path, plates, skip_faulty=True))
    used = set(data.train.keys) | set(data.val.keys)
    assert used == {t.key for i, t in enumerate(tracks) if i not in (1, 4, 8)}


def test_a_test_part_without_texts_is_not_scored(plates, tmp_path):
    (plates/'test_labels.csv').unlink()
    assert open_data(small(tmp_path, plates, mode='student', distill_weight=0)).test is None


def test_a_folder_that_nobody_may_write_stays_as_it_is(plates, tmp_path):
    before = sorted(plates.rglob('*'))
    plates.chmod(0o555)
    try:
        data = open_data(small(tmp_path, plates))
        assert sorted(plates.rglob('*')) == before
        assert open_data(small(tmp_path, plates)).split == data.split
    finally: plates.chmod(0o755)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    for name in ('nowhere', 'empty'):
        if name == 'empty': (tmp_path/name).mkdir()
        with pytest.raises(KdocrError, match=name): open_data(small(tmp_path, tmp_path/name))


# ---------------------------------------------------------------- views that can be counted, pictures that are at hand

@pytest.mark.parametrize('frames', [1, 2, 5])
@pytest.mark.parametrize('how', [dict(aug_strength=1., n_fixed_augs=3), dict(aug_strength=0.), dict(aug_strength=1., n_fixed_augs=2, student_input='mix')])
def test_a_named_view_is_what_the_batch_shows_the_teacher(frames, how):
    noise = np.random.default_rng(0).integers(0, 256, (2, 12, 5, 32, 128, 3), dtype=np.uint8)
    pack = by_hand(12, *noise, degraded=noise[:1].transpose(1, 0, 2, 3, 4, 5))
    data, seen = ICPR_LPR_Distill_Dataset(pack, pack.keys, frames=frames, **how), set()
    for step in range(100):
        b = data.batch(torch.tensor([3, 0, 11, 3]), step)
        assert torch.equal(teacher_view(data, b.rows, b.views), b.clean_hr)
        seen |= set(b.views.tolist())
    assert seen == set(range(count_views(data))), 'every view is shown, and no other'


@pytest.mark.parametrize('how, why', [(dict(aug_strength=1.), 'n_fixed_augs'), (dict(recombine_p=.5), 'recombine_p'), (dict(clean_hr_guided=False), 'clean_hr_guided')])
def test_a_view_that_is_drawn_anew_has_no_number(how, why):
    pack = numbered()
    data = ICPR_LPR_Distill_Dataset(pack, pack.keys, **how)
    with pytest.raises(NotFixed, match=why): count_views(data)
    assert data.batch(torch.arange(4)).views is None


def test_pictures_in_memory_and_in_files_give_the_same_batches():
    pack = numbered()
    def make(): return ICPR_LPR_Distill_Dataset(pack, pack.keys, frames=2, aug_strength=1., student_input='mix')
    mapped, held = make(), make()
    assert to_device_memory([mapped], 'cpu') == 0 and to_device_memory([held, None], 'cpu', 'device') == pack.lr.nbytes + pack.hr.nbytes + pack.degraded.nbytes
    for step in range(3):
        a, b = (d.batch(torch.arange(12), step) for d in (mapped, held))
        assert torch.equal(a.images, b.images) and torch.equal(a.clean_hr, b.clean_hr) and a.keys == b.keys


def test_pictures_that_do_not_fit_are_refused_before_they_are_copied(monkeypatch):
    data = ICPR_LPR_HR_Dataset(numbered(), ['t0'])
    monkeypatch.setattr(kdocr.data.batches, '_free_memory', lambda device: 1_000)
    monkeypatch.setattr(torch, 'from_numpy', None)
    with pytest.raises(KdocrError, match='data_on: device, but the pictures need .* free on .* data_on: disk'): to_device_memory([data], 'cpu', 'device')
    assert to_device_memory([data], torch.device('cuda'), 'auto') == 0, 'read from the files instead'


@pytest.mark.parametrize('how', [dict(aug_strength=1.), dict(aug_strength=1., n_fixed_augs=2, student_input='mix'), dict(aug_strength=1., recombine_p=.7), dict(frames=3)])
def test_the_parts_of_a_batch_are_the_batch(how):
    noise = np.random.default_rng(0).integers(0, 256, (2, 12, 5, 32, 128, 3), dtype=np.uint8)
    pack = by_hand(12, *noise, degraded=noise[:1].transpose(1, 0, 2, 3, 4, 5))
    data = ICPR_LPR_Distill_Dataset(pack, pack.keys, **how)
    rows = torch.tensor([5, 2, 9, 0, 11, 4])
    whole, parts = data.batch(rows, 3), [data.batch(rows, 3, part=slice(a, a + 3)) for a in (0, 3)]
    join = lambda name: torch.cat([getattr(p, name) for p in parts])
    assert torch.equal(join('rows'), whole.rows) and torch.equal(join('clean_hr'), whole.clean_hr)
    assert (join('images') - whole.images).abs().max() < 1e-6, 'a product may sum in another order'
    assert sum([p.keys for p in parts], []) == whole.keys and sum([p.texts for p in parts], []) == whole.texts and sum([p.heights for p in parts], []) == whole.heights
    if whole.views is not None: assert torch.equal(torch.cat([p.views for p in parts]), whole.views)
