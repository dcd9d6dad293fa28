"""Reading what users have. The network of most tests reads bars: sixteen bands of grey, each of which is a class, so that every reading has a known answer."""
import csv, io, itertools, json, os, pickle, pty, subprocess, sys, warnings
from pathlib import Path
import cv2
import numpy as np
import pytest
from PIL import Image
from kdocr.reader import recogniser as R
from kdocr.charset import Charset, fits
from kdocr.cli import main
from kdocr.core import KdocrError
from kdocr.reader.images import find_plates, load_image
from kdocr.reader.recogniser import Network, Reader, load_network

CS, TEXT = Charset(), 'ABC1D23'
ABOUT = dict(charset=CS.chars, height=32, width=128, frames=1, model_type='bars')


def bars(text=TEXT, h=32, w=128):
    "Every second band is a character, at six grey levels a class; the others are the blank's."
    row = np.zeros(16, np.uint8)
    row[1:2*len(text):2] = 6*np.array(CS.encode(text))
    return np.repeat(np.repeat(np.repeat(row, w//16)[None], h, 0)[..., None], 3, 2)

def read_bars(x): # (b,f,3,32,128) in [-1,1] -> (b,16,37), the mean over frames
    v = ((x.mean(2)[:, :, 8] + 1)*127.5).reshape(*x.shape[:2], 16, 8).mean(-1) # (b,f,16)
    return (20*(np.abs(v[..., None] - 6*np.arange(37)) < 3)).mean(1)

READER = Reader(Network(read_bars, ABOUT, 'bars'))

def texts(records): return [r.text for r in records]


@pytest.fixture(scope='session')
def onnx_bars(tmp_path_factory):
    "The same network as an ONNX file: the bands' means, and their distance to each class."
    onnx = pytest.importorskip('onnx', reason='onnx is not installed')
    return save_bars(onnx, tmp_path_factory.mktemp('onnx')/'bars.onnx', dict(kdocr=json.dumps(ABOUT)))

def save_bars(onnx, path, metadata, name='images', shape=('b', 'f', 3, 32, 128)):
    from onnx import TensorProto as T, helper as h, numpy_helper as n
    init = [n.from_array(np.array(v, t), k) for k, v, t in [('shape', [0, 0, 3, 32, 16, 8], 'int64'), ('one', 1, 'f4'), ('half', 127.5, 'f4'), ('near', 3, 'f4'), ('sure', 20, 'f4'), ('last', [-1], 'int64'), ('classes', 6*np.arange(37), 'f4')]]
    nodes = [h.make_node('Reshape', [name, 'shape'], ['bands']), h.make_node('ReduceMean', ['bands'], ['v'], axes=[1, 2, 3, 5], keepdims=0), # (b,16)
             h.make_node('Add', ['v', 'one'], ['v1']), h.make_node('Mul', ['v1', 'half'], ['v2']), h.make_node('Unsqueeze', ['v2', 'last'], ['v3']), h.make_node('Sub', ['v3', 'classes'], ['d']),
             h.make_node('Abs', ['d'], ['a']), h.make_node('Less', ['a', 'near'], ['is']), h.make_node('Cast', ['is'], ['f'], to=T.FLOAT), h.make_node('Mul', ['f', 'sure'], ['logits'])]
    graph = h.make_graph(nodes, 'bars', [h.make_tensor_value_info(name, T.FLOAT, shape)], [h.make_tensor_value_info('logits', T.FLOAT, ('b', 16, 37))], init)
    model = h.make_model(graph, opset_imports=[h.make_opsetid('', 13)], ir_version=8)
    h.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


# ---------------------------------------------------------------- pictures of every kind, read rightly
def grey(): return Image.fromarray(bars()[..., 0])
def large(): return Image.fromarray(bars(h=64, w=256))
def rotated(orientation):
    turn = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90', 7: 'TRANSVERSE', 8: 'ROTATE_270'}[orientation] # stored so that EXIF brings it back
    exif = Image.Exif(); exif[0x0112] = orientation
    return large().transpose(getattr(Image.Transpose, turn)), dict(exif=exif, quality=100, subsampling=0)

def cmyk():
    k = 255 - bars()[..., 0]
    return Image.merge('CMYK', [Image.new('L', (128, 32))]*3 + [Image.fromarray(k)])

def clear_corner():
    "What is transparent shows white paper, whatever colour hides under it."
    a = np.full((32, 128), 255, np.uint8); x = bars()
    a[:16], x[:16] = 0, 77
    return Image.fromarray(np.dstack([x, a]))

KINDS = {
    'rgb.png': lambda: (Image.fromarray(bars()), {}), 'grey.png': lambda: (grey(), {}), 'UPPER.PNG': lambda: (grey(), {}), 'best.jpg': lambda: (large(), dict(quality=100, subsampling=0)),
    'grey.jpg': lambda: (large().convert('L'), dict(quality=100)), 'plain.bmp': lambda: (Image.fromarray(bars()), {}), 'plain.tif': lambda: (Image.fromarray(bars()), {}), 'plain.ppm': lambda: (Image.fromarray(bars()), {}),
    'lossless.webp': lambda: (Image.fromarray(bars()), dict(lossless=True)), 'palette.png': lambda: (grey().convert('P'), {}), 'palette.gif': lambda: (grey().convert('P'), {}), 'alpha.png': lambda: (Image.fromarray(bars()).convert('RGBA'), {}),
    'greyalpha.png': lambda: (grey().convert('LA'), {}), '16bit.png': lambda: (Image.fromarray(bars()[..., 0].astype(np.uint16)*257), {}), '12bit.png': lambda: (Image.fromarray(bars()[..., 0].astype(np.uint16)*16), {}),
    'float.tif': lambda: (Image.fromarray(bars()[..., 0].astype(np.float32)/255), {}), '16bit.tif': lambda: (Image.fromarray(bars()[..., 0].astype(np.uint16)*257), {}), 'cmyk.tif': lambda: (cmyk(), {}),
    'frames.gif': lambda: (grey(), dict(save_all=True, append_images=[Image.fromarray(bars('XYZ9876')[..., 0])])), 'frames.png': lambda: (Image.fromarray(bars()), dict(save_all=True, append_images=[Image.fromarray(bars('XYZ9876'))])),
    'pages.tif': lambda: (Image.fromarray(bars()), dict(save_all=True, append_images=[Image.fromarray(bars('XYZ9876'))])),
    **{f'exif{i}.jpg': lambda i=i: rotated(i) for i in range(2, 9)}, 'exif6.png': lambda: (rotated(6)[0], dict(exif=rotated(6)[1]['exif'])),
}

@pytest.mark.parametrize('name', KINDS)
def test_every_kind_of_picture_is_read(name, tmp_path):
    im, how = KINDS[name]()
    im.save(tmp_path/name, **how)
    r, = READER.read(tmp_path/name)
    assert (r.text, r.layout, r.error) == (TEXT, 'Mercosur', '') and r.confidence > .9 and len(r.char_confidence) == 7
    assert any('first was read' in n for n in r.notes) == (name.split('.')[0] in ('frames', 'pages'))
    assert any('EXIF' in n for n in r.notes) == name.startswith('exif')

def test_sixteen_bit_colour_is_read(tmp_path):
    cv2.imwrite(str(tmp_path/'c.png'), bars().astype(np.uint16)*257)
    cv2.imwrite(str(tmp_path/'c.tif'), bars().astype(np.uint16)*257)
    assert texts(READER.read([tmp_path/'c.png', tmp_path/'c.tif'])) == [TEXT]*2

def test_transparent_is_white(): assert (load_image(clear_corner()).pixels[:16] == 255).all() and (load_image(clear_corner()).pixels[16:] == bars()[16:]).all()

@pytest.mark.parametrize('x', [bars(), bars()[..., 0], bars()[..., :1], np.dstack([bars(), np.full((32, 128), 255, np.uint8)]), bars()[..., 0].astype(np.uint16)*257, bars()[:, ::-1][:, ::-1], Image.fromarray(bars()), grey(),
                               bars()/255, (bars()[..., 0]/255).astype(np.float32), bars()[..., 0].astype('>u2')*257], ids=range(11))
def test_arrays_and_pil_images_are_read(x): assert texts(READER.read([x, x])) == [TEXT]*2 and texts(READER.read(x)) == [TEXT]

def test_bits_are_black_and_white(): assert np.array_equal(load_image(np.eye(20, dtype=bool)).pixels[..., 0], 255*np.eye(20))

def test_pixels_are_those_of_training(tmp_path):
    "Pillow and OpenCV decode PNG and JPEG to the same bytes."
    from kdocr.data.icpr import read_image
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.integers(0, 256, (37, 113, 3), dtype=np.uint8), (5, 5), 1)
    for name, how in [('a.png', {}), *((f'{q}-{s}.jpg', dict(quality=q, subsampling=s)) for q in (30, 75, 95) for s in (0, 1, 2)), ('p.jpg', dict(progressive=True))]:
        Image.fromarray(noise).save(tmp_path/name, **how)
        np.testing.assert_array_equal(load_image(tmp_path/name).pixels, read_image(tmp_path/name))
    crops = sorted((Path(__file__).parents[2]/'shared/data/plates_br/test_crops').rglob('*.*g'))[:40] + sorted(Path('/work/shared/data/plates_br/test_crops').rglob('*.*g'))[:40]
    for p in crops: np.testing.assert_array_equal(load_image(p).pixels, read_image(p))


# ---------------------------------------------------------------- and what is refused, by name
def jpeg(): return cv2.imencode('.jpg', bars())[1].tobytes()
def png(): return cv2.imencode('.png', np.random.default_rng(0).integers(0, 256, (32, 128, 3), dtype=np.uint8))[1].tobytes()

BAD = {
    'text.png': (lambda p: p.write_text('not a picture'), 'not an image'), 'empty.jpg': (lambda p: p.write_bytes(b''), 'empty file'), 'cut.jpg': (lambda p: p.write_bytes(jpeg()[:-200]), 'damaged'),
    'cut.png': (lambda p: p.write_bytes(png()[:len(png())//2]), 'truncated PNG'), 'head.png': (lambda p: p.write_bytes(png()[:20]), ''), 'flipped.png': (lambda p: p.write_bytes(png()[:200] + b'\0\1\2\3' + png()[204:]), 'check sum'),
    'one.png': (lambda p: Image.new('RGB', (1, 1)).save(p), '1x1 pixels'), 'line.png': (lambda p: Image.new('RGB', (300, 1)).save(p), '300x1 pixels'), 'float.tif': (lambda p: Image.new('F', (128, 32), 99.).save(p), 'outside of 0 to 1'),
    'huge.png': (lambda p: Image.new('1', (10_000, 10_000)).save(p), '10000x10000 pixels'), 'bomb.png': (lambda p: Image.new('1', (20_000, 10_000)).save(p), 'million'),
    'draw.png': (lambda p: p.write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'), 'not an image'), 'draw.svg.png': (lambda p: p.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>'), 'not an image'),
    'pipe.png': (lambda p: os.mkfifo(p), 'not a regular file'), 'gone.png': (lambda p: None, 'No such file'), 'x'*300 + '.png': (lambda p: None, ''),
}

@pytest.mark.parametrize('name', BAD, ids=lambda n: n[:12])
def test_bad_pictures_are_named_and_the_rest_is_read(name, tmp_path):
    make, said = BAD[name]
    make(tmp_path/name)
    before, bad, after = READER.read([bars(), tmp_path/name, bars()])
    assert (before.text, bad.text, bad.confidence, after.text) == (TEXT, '', 0, TEXT)
    assert bad.path == str(tmp_path/name) and bad.error and said in bad.error and not before.error

def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new('1', (10_000, 10_000)).save(tmp_path/'huge.png')
    monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('it was decoded'))
    assert 'pixels' in READER.read(tmp_path/'huge.png')[0].error

def test_a_damaged_pil_image_is_said(tmp_path):
    noise = cv2.imencode('.jpg', np.random.default_rng(0).integers(0, 256, (64, 256, 3), dtype=np.uint8))[1].tobytes()
    (tmp_path/'a.jpg').write_bytes(noise[:len(noise)//2]) # its header is whole
    assert [r.error[:7] for r in READER.read([Image.open(tmp_path/'a.jpg'), bars()])] == ['damaged', '']

@pytest.mark.parametrize('x, said', [(np.full((32, 128), 1.01), 'outside of 0 to 1'), (np.full((32, 128), -.01), 'outside of 0 to 1'), (np.full((32, 128), np.nan), 'outside of 0 to 1'), (np.zeros((32, 128), int), 'int64'), (np.zeros((5, 32, 128), np.uint8), 'shape'),
                                     (np.zeros((32, 128, 2), np.uint8), 'shape'), (np.zeros((0, 0), np.uint8), '0x0'), (7, 'int is no image'), (None, 'NoneType'), (b'\x89PNG', 'bytes is no image'), ('', 'not a regular file')])
def test_what_is_no_picture_in_python(x, said): assert said in READER.read([x])[0].error


# ---------------------------------------------------------------- folders and tracks
def save(path, text=TEXT): path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(bars(text)).save(path); return path

def test_folders_and_tracks_are_found_in_order(tmp_path):
    for i in (1, 2, 3, 4, 5): save(tmp_path/f'test/track_2/lr-00{i}.png'); save(tmp_path/f'test/track_2/hr-00{i}.png')
    for i in (1, 4): save(tmp_path/f'test/track_1/lr-00{i}.jpg')
    save(tmp_path/'b.png'); save(tmp_path/'a/z.JPG'); save(tmp_path/'.hidden/x.png'); save(tmp_path/'a/.x.png')
    (tmp_path/'test/track_3').mkdir(); (tmp_path/'a/notes.txt').write_text('-'); (tmp_path/'loop').symlink_to(tmp_path)
    found = [(i.name.removeprefix(f'{tmp_path}/'), [Path(f).name[:6] for f in i.frames], i.missing) for i in find_plates(tmp_path)]
    assert found == [('b.png', ['b.png'], ()), ('a/z.JPG', ['z.JPG'], ()), ('test/track_1', ['lr-001', 'lr-004'], ('lr-002: missing', 'lr-003: missing', 'lr-005: missing')),
                     ('test/track_2', [f'lr-00{i}' for i in range(1, 6)], ()), ('test/track_3', [], tuple(f'lr-00{i}: missing' for i in range(1, 6)))]
    records = READER.read(tmp_path)
    assert [r.frames for r in records] == [1, 1, 2, 5, 0] and 'missing' in records[-1].error

def test_a_bad_frame_is_left_out_and_said(tmp_path):
    track = [save(tmp_path/f'track_1/lr-00{i}.png') for i in range(1, 6)]
    track[2].write_bytes(b'not an image')
    for how in ('sum', 'vote'):
        r, = READER.read(tmp_path/'track_1', frames=how)
        assert (r.text, r.frames, r.error) == (TEXT, 4, '') and r.missing[0].startswith('lr-003.png: not an image') and len(r.missing) == 1

def test_a_frame_twice_is_said(tmp_path):
    save(tmp_path/'t/lr-001.bmp'); save(tmp_path/'t/lr-001.png')
    assert 'frame 1 is also there' in str(READER.read(tmp_path/'t')[0])

def test_links_are_followed_but_for_those_that_lead_back_up(tmp_path):
    for i in range(1, 6): save(tmp_path/f'far/track_9/lr-00{i}.png')
    save(tmp_path/'in/a/b.png')
    for name, to in (('track_1', tmp_path/'far/track_9'), ('up', tmp_path), ('root', '/'), ('here', '.'), ('a/back', '../a'), ('self', 'self'), ('z', tmp_path/'far')): (tmp_path/'in'/name).symlink_to(to)
    (tmp_path/'far/down').symlink_to(tmp_path/'in') # a ring of two
    assert [(i.name.removeprefix(f'{tmp_path}/'), len(i.frames)) for i in find_plates(tmp_path/'in')] == [('in/a/b.png', 1), ('in/track_1', 5), ('in/z/track_9', 5)]

def test_a_track_is_one_with_a_slash_at_its_end(tmp_path):
    (tmp_path/'track_7').mkdir()
    assert [i.missing[0] for i in find_plates(f'{tmp_path}/track_7/')] == ['lr-001: missing']

def test_arrays_of_arrays_and_iterators():
    "What is stacked reads as what is listed; an iterator is drawn from as far as it is asked."
    x, y = bars(), bars('XYZ9876')
    assert [(r.path, r.text) for r in READER.read(np.stack([x, y]))] == [('image 0', TEXT), ('image 1', 'XYZ9876')]
    assert [(r.path, r.frames) for r in READER.read([x, np.stack([x]*5)])] == [('image 0', 1), ('track 1', 5)]
    assert [r.frames for r in READER.read(np.stack([[x]*3]*2))] == [3, 3] and READER.read(R.PlateInput('by name', [x]))[0].path == 'by name'
    camera = itertools.count()
    stream = READER.stream((x for _ in camera), batch=4)
    assert [next(stream).text for _ in range(5)] == [TEXT]*5 and next(camera) == 8 and READER.read(iter([])) == READER.read([]) == []

def test_a_csv_stands_for_what_it_lists(tmp_path):
    for n in ('a.png', 'far/ü 1.png', 'far/2.png'): save(tmp_path/n)
    save(tmp_path/'near.png', 'XYZ9876')
    def read(text): (tmp_path/'x.csv').write_bytes(text.encode()); return [(r.path.removeprefix(f'{tmp_path}/'), r.text, r.frames, r.error or '; '.join(r.missing)) for r in READER.read(str(tmp_path/'x.csv'))]
    assert read('image,text\na.png,-\nnear.png,\n') == [('a.png', TEXT, 1, ''), ('near.png', 'XYZ9876', 1, '')]
    assert read('\ufeffhr,lr,text,track\r\nnear.png,far/ü 1.png,-,t\r\nnear.png,gone.png,-,t\r\nnear.png,far/2.png,-,\r\n,,-,\r\nnear.png,far/2.png,-,t\r\n') == [
        ('t', TEXT, 2, 'gone.png: No such file or directory'), ('far/2.png', TEXT, 1, ''), ('x.csv:5', '', 0, 'no frames')]
    assert read('hr;lr;text\n') == [('x.csv', '', 0, "its cells are divided by ';'; a comma is needed")] and 'needed are the columns' in read('a.png\n')[0][3] + read('text\n')[0][3]

def test_an_empty_folder_is_said(tmp_path): assert READER.read(tmp_path)[0].error == 'no images in it'

def test_names_that_are_no_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b'/caf\xe9 \xf0\x9f\x9a\x97.png'
    with open(path, 'wb') as f: Image.fromarray(bars()).save(f, 'PNG')
    r, = READER.read(tmp_path)
    assert r.text == TEXT and r.path.encode('utf-8').endswith(' 🚗.png'.encode())


# ---------------------------------------------------------------- frames, layouts, temperatures
def net(logits_of, **about): return Reader(Network(logits_of, {**ABOUT, **about}, 'made up'))
def said(*texts_and_logits): # a network that says by the first pixel what is asked
    def run(x):
        out = np.zeros((len(x), 16, 37))
        for i, v in enumerate(((x[:, 0, 0, 0, 0] + 1)*127.5).round().astype(int)):
            text, sure = texts_and_logits[v]
            out[i, :, 0] = sure; out[i, range(1, 2*len(text), 2), 0] = 0; out[i, range(1, 2*len(text), 2), CS.encode(text)] = sure
        return out
    return run
def flat(v): return np.full((32, 128, 3), v, np.uint8)

def test_sum_and_vote_differ_as_they_should():
    "Two frames that are a little for A outvote one that is certain of B; their sum does not."
    r = net(said(('AAA1A11', 6), ('BBB2B22', 30)))
    track = [[flat(0), flat(1), flat(0)]]
    assert texts(r.read(track, frames='vote')) == ['AAA1A11'] and texts(r.read(track, frames='sum')) == ['BBB2B22']

def test_three_equal_frames_are_one_witness():
    one, three = (READER.read([[bars()]*k], frames='sum')[0] for k in (1, 3))
    assert one.confidence == pytest.approx(three.confidence, rel=1e-9)

def test_a_votes_confidence_is_the_mean_of_its_frames():
    r = net(said(('AAA1A11', 9), ('BBB2B22', 9)))
    alone, both = r.read([flat(0)])[0], r.read([[flat(0), flat(0), flat(1)]], frames='vote')[0]
    assert both.text == 'AAA1A11' and both.confidence == pytest.approx(alone.confidence*2/3, rel=1e-3)

def test_attention_sees_frames_at_once_by_their_number():
    seen = []
    r = Reader(Network(lambda x: (seen.append(x.shape[:2]), read_bars(x))[1], dict(ABOUT, frames=5), 'fuses'))
    assert texts(r.read([[bars()]*k for k in (5, 1, 3, 5)])) == [TEXT]*4 and seen == [(1, 1), (1, 3), (2, 5)]
    seen.clear()
    assert r.read([[bars()]*3], frames='sum')[0].text == TEXT and seen == [(3, 1)]

def test_attention_of_single_frames_is_refused():
    with pytest.raises(KdocrError, match='single frames'): READER.read(bars(), frames='attention')

def test_temperature_is_that_of_the_number_of_frames():
    r = net(said(('ABC1D23', 4.)), temperature=9., temperatures=[2., 1., .5])
    conf = [r.read([[flat(0)]*k])[0].confidence for k in (1, 2, 3, 5)]
    assert conf[0] < conf[1] < conf[2] == conf[3] and [r.temperature(k) for k in (1, 2, 3, 5)] == [2., 1., .5, .5]
    assert net(said(('A', 1)), temperature=3.).temperature(4) == 3 and READER.temperature(1) == 1

def test_a_reading_is_a_plate_unless_asked_for():
    r = net(said(('12AB', 8), ('', 8), ('A', 8)))
    for x in range(3):
        assert fits(r.read(flat(x))[0].text, 'Brazilian') or fits(r.read(flat(x))[0].text, 'Mercosur')
        assert fits(r.read(flat(x), layout='Brazilian')[0].text, 'Brazilian')
    assert texts(r.read([flat(0), flat(1)], layout='free')) == ['12AB', ''] == texts(r.read([flat(0), flat(1)], decoder='greedy')) == texts(r.read([flat(0), flat(1)], 'beam'))
    assert r.read(flat(0), layout='DDLL|L')[0].text == '12AB' and r.read(flat(0), layout='free')[0].layout == ''

# ---------------------------------------------------------------- a second look
def ramp(v): # the first pixel tells how far a look is shifted: 0 lies at (4, 8)
    x = np.full((32, 128, 3), v, np.uint8)
    x[:, :, 1] += np.arange(128, dtype=np.uint8)[None]; x[:, :, 2] += np.arange(32, dtype=np.uint8)[:, None]
    return x

def counting(sure): # a network that is as sure as the first pixel's red says, and keeps what it saw
    seen, run = [], said(*(('ABC1234', s) for s in sure))
    return (lambda x: (seen.append(np.round((x[:, :, :, 4, 8] + 1)*127.5).astype(int)), run(x))[1]), seen

def test_only_those_that_a_first_look_is_not_sure_of_are_looked_at_again():
    run, seen = counting((30, 1))
    net(run).read([ramp(0), ramp(1), ramp(0)])
    first, *others = seen
    assert first[:, 0].tolist() == [[0, 8, 4], [1, 9, 5], [0, 8, 4]]
    assert [x[:, 0].tolist() for x in others] == [[[1, 9 + x, 5 + y]] for x, y in ((3, 0), (-3, 0), (0, 1), (0, -1))]
    for again, looks in ((0, 1), (1, 5)):
        run, seen = counting((30, 1))
        net(run).read(ramp(0), tta_below=again)
        assert len(seen) == looks

@pytest.mark.parametrize('frames', ['sum', 'vote', 'attention'])
def test_a_second_look_is_the_mean_of_five(frames):
    rng = np.random.default_rng(0)
    weights = rng.normal(0, .02, (32*128*3, 16*37)).astype('f4')
    def run(x): return (x.mean(1).reshape(len(x), -1) @ weights).reshape(-1, 16, 37)
    r, track = net(run, frames=1 + 4*(frames == 'attention')), rng.integers(0, 255, (2, 32, 128, 3)).astype(np.uint8)
    def by_hand(): # for sum and attention
        looks = [np.stack([np.roll(f, (-y, -x), (0, 1)) for f in np.pad(track, ((0, 0), (8, 8), (8, 8), (0, 0)), 'edge')])[:, 8:-8, 8:-8] for x, y in R._TTA_SHIFTS]
        return [run((f/np.float32(127.5) - 1).transpose(0, 3, 1, 2)[:, None] if frames == 'sum' else (f/np.float32(127.5) - 1).transpose(0, 3, 1, 2)[None]) for f in looks]
    def norm(x): return x - np.log(np.exp(x).sum(-1, keepdims=True))
    one, five = r.read([list(track)], frames=frames, tta_below=0)[0], r.read([list(track)], frames=frames, tta_below=1)[0]
    assert one.text and five.text and one.confidence != five.confidence
    assert r.read([list(track), flat(3)], frames=frames, tta_below=1, batch=2)[0].text == five.text, 'whatever its neighbours'
    if frames != 'vote':
        x = norm(np.mean([norm(norm(y).mean(0)) for y in by_hand()], 0))
        assert np.abs(r.log_probs([track], frames)[0] - x).max() < 1e-4

def test_how_unsure_is_a_probability():
    for p in (-.1, 1.1, 90, float('nan')):
        with pytest.raises(KdocrError, match=f'tta_below {p}: a confidence'): READER.read(flat(0), tta_below=p)

def test_the_layout_is_the_networks_own():
    assert net(read_bars, layouts=['Mercosur']).resolve_options().layout == 'Mercosur' and net(read_bars, layouts='either').resolve_options().layout == 'either' and net(read_bars, layouts=[]).resolve_options()[:3] == ('beam', '', 'sum')
    assert Reader(Network(read_bars, dict(ABOUT, charset='0123456789'), 'digits')).resolve_options()[:3] == ('beam', '', 'sum')
    with pytest.raises(KdocrError, match='a letter'): Reader(Network(read_bars, dict(ABOUT, charset='0123456789'), 'digits')).resolve_options(layout='either')

def test_pictures_are_opened_a_batch_at_a_time(monkeypatch):
    opened = []
    monkeypatch.setattr(R, 'load_image', lambda s: (opened.append(s), load_image(s))[1])
    stream = READER.stream([bars()]*10_000, batch=20)
    next(stream)
    assert len(opened) == 20
    for _ in range(20): next(stream)
    assert len(opened) == 40


# ---------------------------------------------------------------- checkpoints
class Bomb:
    def __reduce__(self): return (os.mkdir, (os.environ['KDOCR_TEST_BOMB'],))

@pytest.mark.parametrize('how', ['pickle.pth', 'zip.pth', 'zip.onnx', 'pickle.bin'])
def test_code_in_a_checkpoint_is_never_run(how, tmp_path, monkeypatch):
    torch = pytest.importorskip('torch')
    monkeypatch.setenv('KDOCR_TEST_BOMB', str(tmp_path/'ran'))
    bomb = dict(format=1, model=Bomb(), charset=CS.chars)
    if how.startswith('zip'): torch.save(bomb, tmp_path/how)
    else: (tmp_path/how).write_bytes(pickle.dumps(bomb))
    with pytest.raises(KdocrError, match=how): load_network(tmp_path/how)
    assert not (tmp_path/'ran').exists()
    pickle.loads(pickle.dumps(Bomb())); assert (tmp_path/'ran').exists() # it would have

@pytest.fixture
def weights(tmp_path):
    torch = pytest.importorskip('torch')
    from kdocr.config import Config
    from kdocr.models.restran import make_model
    from kdocr.training.run_folder import describe, save_checkpoint
    torch.manual_seed(0)
    return save_checkpoint(tmp_path/'run/checkpoints/best.pth', dict(describe(Config(), 'restran_tiny', ''), model=make_model('restran_tiny').state_dict(), step=1, temperature=1.5))

def test_run_folders_and_damaged_checkpoints(weights, tmp_path):
    assert Reader.load(tmp_path/'run').temperature(1) == 1.5 and 'restran_tiny' in repr(Reader.load(weights))
    weights.write_bytes(weights.read_bytes()[:5000])
    (tmp_path/'empty/checkpoints').mkdir(parents=True); os.mkfifo(tmp_path/'pipe')
    for path, text in ((weights, 'damaged'), (tmp_path/'gone.pth', 'no such checkpoint'), (tmp_path, 'without checkpoints/best.pth'), (tmp_path/'empty', 'without checkpoints/best.pth'), (tmp_path/'pipe', 'not a regular file')):
        with pytest.raises(KdocrError, match=text): load_network(path)

@pytest.mark.parametrize('name', ['best.pth', 'best.onnx'])
def test_a_checkpoint_that_may_not_be_read(name, weights, monkeypatch, capsys):
    path, usual = weights.rename(weights.with_name(name)), open
    def refused(file, *a, **kw):
        if str(file) == str(path): raise PermissionError(13, 'Permission denied', str(path))
        return usual(file, *a, **kw)
    monkeypatch.setattr('builtins.open', refused)
    assert main(['read', 'x.png', '--ckpt', str(path)]) == 2 and capsys.readouterr().err == f'kdocr: {path}: Permission denied\n'

def test_a_foreign_pickle_is_one_line(tmp_path, monkeypatch, capsys):
    "torch warns of its age before it refuses it."
    monkeypatch.setenv('KDOCR_TEST_BOMB', str(tmp_path/'ran'))
    (tmp_path/'old.pth').write_bytes(pickle.dumps(Bomb(), protocol=4))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert main(['read', 'x.png', '--ckpt', str(tmp_path/'old.pth')]) == 2 and not seen
    assert capsys.readouterr() == ('', f'kdocr: {tmp_path}/old.pth: damaged, or no checkpoint; code that is pickled in it is never run\n') and not (tmp_path/'ran').exists()

def test_it_reads_what_training_reads(weights):
    "The same texts as `evaluate`, from the folders as from the pack."
    torch = pytest.importorskip('torch')
    from small_runs import drawn, small
    from kdocr.data.batches import open_data
    from kdocr.training.run_folder import load_model
    from kdocr.training.evaluation import evaluate
    model, data = load_model(weights), open_data(small('unused', mode='student', teacher_checkpoint=weights))
    with torch.no_grad(): model.head.weight.mul_(30) # random weights that say something
    read = evaluate(model, data.test, CS, torch.device('cpu'), frames=5)
    def run(x):
        with torch.no_grad(): return model.forward_taps(torch.from_numpy(x)).logits.numpy()
    records = Reader(Network(run, ABOUT, 'weights')).read(f'{drawn()}/test', decoder='greedy', tta_below=0) # one look, as in training
    assert {Path(r.path).name: r.text for r in records} == {p.key: p.pred for p in read} and any(p.pred for p in read)

def test_training_leaves_temperatures(tmp_path):
    pytest.importorskip('torch')
    from small_runs import small
    from kdocr.training.run_folder import load_checkpoint
    from kdocr.training.train_kd import train_kd
    run = train_kd(small(tmp_path, steps=4))
    best = load_checkpoint(run.best)
    assert len(best['temperatures']) == 5 and all(.1 <= t <= 10 for t in best['temperatures']) and best['temperature'] == best['temperatures'][0] and best['layouts'] == ['Brazilian', 'Mercosur']
    assert load_checkpoint(run.published)['temperatures'] == best['temperatures'] and Reader.load(run.path).temperature(5) == best['temperatures'][4]

def test_onnx_reads_the_same_without_torch(onnx_bars, tmp_path):
    for i in range(1, 6): save(tmp_path/f'in/track_1/lr-00{i}.png')
    save(tmp_path/'in/x.png', 'XYZ9876')
    code = f"import sys; sys.modules['torch'] = None\nfrom kdocr.cli import main; sys.exit(main(['read', {str(tmp_path/'in')!r}, '--ckpt', {str(onnx_bars)!r}, '--format', 'jsonl']))"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0 and r.stderr == ''
    rows = [json.loads(l) for l in r.stdout.splitlines()]
    assert [(x['text'], x['frames'], x['layout']) for x in rows] == [('XYZ9876', 1, 'Brazilian'), (TEXT, 5, 'Mercosur')]
    for mine, theirs in zip(READER.read(tmp_path/'in'), rows): assert mine.confidence == pytest.approx(theirs['confidence'], rel=1e-4)

def test_a_checkpoint_without_torch_is_one_line(weights, tmp_path):
    code = f"import sys; sys.modules['torch'] = None\nfrom kdocr.cli import main; sys.exit(main(['read', '/x.png', '--ckpt', {str(weights)!r}]))"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 2 and 'needs PyTorch' in r.stderr and r.stderr.count('\n') == 1

@pytest.mark.parametrize('case, text', [('no card', 'not an ONNX file of'), ('card no json', 'description of the network: Invalid JSON'), ('card a list', 'description of the network: Input should be an object'), ('card not whole', 'incomplete description of the network: charset, frames'), ('temperature', 'incomplete description of the network: temperature'), ('temperatures', 'incomplete description of the network: temperature'), ('layouts', 'incomplete description of the network: layouts'), ('no height', 'incomplete description of the network: height'),
                                        ('input name', "not a plate reader: it has ..'pixels'"), ('input shape', 'not a plate reader'), ('classes', "not a plate reader: .*'logits'"), ('size', 'not a plate reader'), ('charset twice', 'more than once'), ('text', 'no ONNX file'), ('cut', 'no ONNX file'), ('empty', 'no ONNX file')])
def test_an_onnx_file_of_something_else(case, text, onnx_bars, tmp_path):
    import onnx
    card = {'no card': None, 'card no json': '{', 'card a list': '[]', 'card not whole': json.dumps(dict(height=32, width=128)), 'temperature': json.dumps(dict(ABOUT, temperature=0)), 'temperatures': json.dumps(dict(ABOUT, temperatures=3)), 'layouts': json.dumps(dict(ABOUT, layouts=[7])), 'no height': json.dumps(dict(ABOUT, height=0)), 'classes': json.dumps(dict(ABOUT, charset='ABC')),
            'size': json.dumps(dict(ABOUT, width=64)), 'charset twice': json.dumps(dict(ABOUT, charset='AAB'))}.get(case, json.dumps(ABOUT))
    other = {'input name': dict(name='pixels'), 'input shape': dict(shape=('b', 3, 32, 128, 1))}.get(case, {})
    path = save_bars(onnx, tmp_path/'other.onnx', {} if card is None else dict(kdocr=card), **other)
    if case in ('text', 'cut', 'empty'): path.write_bytes({'text': b'hello', 'cut': path.read_bytes()[:100], 'empty': b''}[case])
    with pytest.raises(KdocrError, match=text) as e: load_network(path)
    assert 'other.onnx' in str(e.value)

def test_no_reader_was_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(R, 'files', lambda _: tmp_path)
    assert main(['read', 'x.png']) == 2 and 'no reader came with this installation' in capsys.readouterr().err


# ---------------------------------------------------------------- the command
def test_one_bad_file_in_a_folder_of_many(onnx_bars, tmp_path, capsys):
    for i in range(200): save(tmp_path/f'in/{i:03d}.png', f'ABC{i:04d}')
    (tmp_path/'in/100.png').write_text('not an image')
    assert main(['read', str(tmp_path/'in'), '--ckpt', str(onnx_bars), '--out', str(tmp_path/'out.csv'), '--batch', '16']) == 1
    out, err = capsys.readouterr()
    assert out == '' and f'kdocr: {tmp_path}/in/100.png: not an image' in err and '200/200' in err
    rows = list(csv.DictReader(open(tmp_path/'out.csv', encoding='utf-8')))
    assert [r['text'] for r in rows] == [f'ABC{i:04d}' if i != 100 else '' for i in range(200)] and 'not an image' in rows[100]['error']
    assert len(rows[0]['char_confidence'].split()) == 7 and {p.name for p in tmp_path.iterdir()} == {'in', 'out.csv'}

def test_formats_agree(onnx_bars, tmp_path, capsys):
    a, b = save(tmp_path/'a, "b".png'), tmp_path/'gone.png'
    shown = {}
    for shape in ('table', 'jsonl', 'csv'):
        assert main(['read', str(a), str(b), '--ckpt', str(onnx_bars), '--format', shape]) == 1
        shown[shape], err = capsys.readouterr()
        assert err == f'kdocr: {b}: No such file or directory\n'
    table, rows, lines = shown['table'].splitlines(), list(csv.DictReader(shown['csv'].splitlines())), [json.loads(l) for l in shown['jsonl'].splitlines()]
    assert len(table) == 3 and TEXT in table[1] and str(a) in table[1] and 'No such file' in table[2]
    assert [r['path'] for r in rows] == [l['path'] for l in lines] == [str(a), str(b)] and [r['text'] for r in rows] == [l['text'] for l in lines] == [TEXT, '']
    assert float(rows[0]['confidence']) == lines[0]['confidence'] and lines[1]['error'] == rows[1]['error'] == 'No such file or directory'
    assert main(['read', str(a), '--ckpt', str(onnx_bars), '--out', str(tmp_path/'x.jsonl')]) == 0 and json.loads((tmp_path/'x.jsonl').read_text())['text'] == TEXT

@pytest.mark.parametrize('args, text', [(['--decoder', 'gredy'], "did you mean 'greedy'"), (['--frames', 'votes'], "did you mean 'vote'"), (['--format', 'json'], "did you mean 'jsonl'"), (['--layout', 'AAA0000'], "'A' is no place"),
                                        (['--batch', '0'], 'at least 1'), (['--out', '/'], '/: a folder'), (['--out', ''], '--out: an empty path'), (['--out', 'x.json'], "x.json: format 'json': did you mean 'jsonl'"), (['--out', '/proc/nowhere/x.csv'], '/proc/nowhere/x.csv'), (['--device', 'cuda'], 'cuda'), (['--device', 'gpu'], "device 'gpu'; known: auto, cpu, cuda"), (['--decoder', 'greedy', '--layout', 'Mercosur'], "layout 'Mercosur': the decoder greedy reads anything"), (['--frames', 'attention'], 'single frames')])
def test_a_wrong_setting_is_one_line_and_status_2(args, text, onnx_bars, tmp_path, capsys):
    save(tmp_path/'a.png')
    assert main(['read', str(tmp_path/'a.png'), '--ckpt', str(onnx_bars), *args]) == 2
    out, err = capsys.readouterr()
    assert text in err and err.count('\n') == 1 and TEXT not in out


def test_a_name_cannot_break_a_line(onnx_bars, tmp_path, capsys):
    names = ['a\nb.png', 'a\x1b[31m.png', 'ü \u00a0\t.png']
    for n in names: save(tmp_path/n)
    (tmp_path/'bad\r.png').touch()
    asked = ['read', str(tmp_path), '--ckpt', str(onnx_bars), '--format']
    assert main([*asked, 'table']) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5 and out.isascii() == False and all(c.isprintable() or c == '\n' for c in out + err) and f'{tmp_path}/bad\\r.png: empty file' in err
    for shape, read in (('jsonl', lambda s: [json.loads(l) for l in s.split('\n')[:-1]]), ('csv', lambda s: list(csv.DictReader(io.StringIO(s, newline=''))))):
        assert main([*asked, shape]) == 1
        assert [r['path'] for r in read(capsys.readouterr().out)] == sorted(f'{tmp_path}/{n}' for n in [*names, 'bad\r.png'])

def test_an_empty_path_is_not_the_present_folder(capsys):
    assert main(['read', 'a.png', '--ckpt', '']) == 2 and '--ckpt: an empty path' in capsys.readouterr().err
    assert main(['read', '']) == 2 and capsys.readouterr().err == 'kdocr: an empty path (see: kdocr read --help)\n'

def on_a_terminal(*args):
    "What a person sees, with standard output and error on one terminal."
    outer, inner = pty.openpty()
    p = subprocess.Popen([sys.executable, '-m', 'kdocr', *args], stdout=inner, stderr=inner)
    os.close(inner)
    seen = b''
    try:
        while block := os.read(outer, 4096): seen += block
    except OSError: pass # how a terminal says that the other end is closed
    os.close(outer)
    return p.wait(), seen.decode().replace('\r', '').splitlines()

def test_a_terminal_is_told_once(onnx_bars, tmp_path):
    asked = ['read', str(save(tmp_path/'a.png')), str(tmp_path/'gone.png'), '--ckpt', str(onnx_bars)]
    status, lines = on_a_terminal(*asked)
    assert status == 1 and len(lines) == 3 and TEXT in lines[1] and lines[2].endswith('gone.png  (No such file or directory)')
    status, lines = on_a_terminal(*asked, '--format', 'jsonl') # which a person may not look through
    assert status == 1 and len(lines) == 3 and lines[1] == f'kdocr: {tmp_path}/gone.png: No such file or directory'

def test_whoever_reads_us_may_have_enough(onnx_bars, tmp_path):
    "`| head -1` ends us quietly; a full disk does so in one line."
    save(tmp_path/'a.png')
    cmd = [sys.executable, '-m', 'kdocr', 'read', *[str(tmp_path/'a.png')]*300, '--ckpt', str(onnx_bars), '--format', 'jsonl']
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert json.loads(p.stdout.readline())['text'] == TEXT
    p.stdout.close()
    assert b'Traceback' not in p.stderr.read() and p.wait() == 141
    with open('/dev/full', 'w') as full: r = subprocess.run(cmd[:5] + cmd[-4:], stdout=full, stderr=subprocess.PIPE, text=True)
    assert r.returncode == 2 and r.stderr == 'kdocr: standard output: could not be written (No space left on device)\n'

def test_what_is_no_file_is_written_to_and_not_replaced(onnx_bars, tmp_path):
    asked = ['read', str(save(tmp_path/'a.png')), '--ckpt', str(onnx_bars), '--format', 'jsonl', '--out']
    (tmp_path/'real').mkdir(); (tmp_path/'link.jsonl').symlink_to(tmp_path/'real/x.jsonl')
    for _ in range(2): assert main([*asked, str(tmp_path/'link.jsonl')]) == 0 and (tmp_path/'link.jsonl').is_symlink() and json.loads((tmp_path/'real/x.jsonl').read_text())['text'] == TEXT
    os.mkfifo(tmp_path/'pipe')
    p = subprocess.Popen([sys.executable, '-m', 'kdocr', *asked, str(tmp_path/'pipe')])
    assert json.loads((tmp_path/'pipe').read_text())['text'] == TEXT and p.wait() == 0 and not (tmp_path/'pipe').is_file()

def test_broken_exif_is_passed_over_in_silence(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6
    large().save(tmp_path/'a.jpg', exif=exif.tobytes()[:20], quality=100, subsampling=0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert texts(READER.read(tmp_path/'a.jpg')) == [TEXT] and not seen
        Image.open(tmp_path/'a.jpg').getexif(); assert seen # it would have


# ---------------------------------------------------------------- the notebook
@pytest.mark.slow
@pytest.mark.parametrize('runs', [2, 0])
def test_the_frames_notebook(runs, tmp_path):
    "A reader of single frames and one that fuses them, on the same tracks; and nothing at all."
    pytest.importorskip('torch')
    import nbformat
    from small_runs import small
    from kdocr.jobs.notebooks import run_notebook
    from kdocr.training.train_kd import train_kd
    done = [train_kd(small(tmp_path/'results', name=f'frames{f}', arm=f'frames{f}', mode='student', distill_weight=0, frames=f, steps=2)) for f in (1, 3)[:runs]]
    nb = nbformat.read(run_notebook('frames', tmp_path/'out', dict(runs=','.join(str(r.path) for r in done), out=str(tmp_path/'out'), tracks='4', fit_tracks='4')), 4)
    shown = '\n'.join(o.get('text', '') + o.get('data', {}).get('text/plain', '') for c in nb.cells for o in c.get('outputs', []))
    if not runs:
        assert 'No finished run' in shown and not (tmp_path/'out/figures').exists()
        return
    assert (tmp_path/'out/figures/frames.png').is_file() and (tmp_path/'out/figures/frames_reliability.pdf').is_file()
    assert 'attention of five against one frame' in shown and 'constrained against greedy' in shown and 'damaged.png: ' in shown and 'lr-005.gone: No such file' in shown
