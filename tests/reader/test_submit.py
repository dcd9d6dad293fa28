"""A submission: the competition's form, every track once, nothing but plates; and everything that is refused before the organisers do."""
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TEST, write_track
from kdocr.charset import Charset, layout_of
from kdocr.cli import main
from kdocr.config import Config
from kdocr.core import KdocrError
from kdocr.decoding import log_softmax
from kdocr.data.icpr import index_data
from kdocr.reader.images import PlateInput, load_image
from kdocr.reader.recogniser import Network, Reader, Record
from kdocr.models.restran import make_model
from kdocr.training.run_folder import describe, save_checkpoint
from kdocr.reader.submit import (_agree, _asked, _read_together, _submission_line, _written, _zip, check_submission,
                                 submit)

KEYS = ['track_20001', 'track_20002', 'track_20003']
PHOTOGRAPHS = Path(__file__).resolve().parent.parent.parent.parent/'shared/data/plates_br'
GOOD = ''.join(f'{k},ABC1D23;0.5000\n' for k in KEYS)


def checkpoint(path, seed=0, model_type='restran_tiny', **values):
    torch.manual_seed(seed)
    cfg = Config(**values)
    model = make_model(model_type, len(Charset(cfg.charset)))
    with torch.no_grad(): model.head.weight.mul_(5); model.head.bias[0] += 2 # sure of something, mostly blanks
    return save_checkpoint(path, dict(describe(cfg, model_type, 'none'), model=model.state_dict(), step=0))


def packed(path, text=GOOD, name='submission.txt', **more):
    with zipfile.ZipFile(path, 'w') as z:
        if text is not None: z.writestr(name, text)
        for k, v in more.items(): z.writestr(k, v)
    return path


def lines(path):
    with zipfile.ZipFile(path) as z: return z.read(z.namelist()[0]).decode().splitlines()


def write_submission(out, rows):
    with _written(out) as tmp: _zip(tmp, out.stem, rows)
    return out


def _asked_tracks(folder): return _asked(folder)[1]


def faults(path, folder): return [f.removeprefix(f'{path}: ') for f in check_submission(path, folder)]


# ---------------------------------------------------------------- the form
def test_a_line_and_a_zip(tmp_path):
    assert _submission_line('track_00001', 'ABC1234', .98764) == 'track_00001,ABC1234;0.9876'
    rows = [(k, 'ABC1234', i / 7) for i, k in enumerate(KEYS)]
    a, b = write_submission(tmp_path/'a b.zip', rows), write_submission(tmp_path/'c'/'a b.zip', rows[::-1])
    assert a.read_bytes() == b.read_bytes() and zipfile.ZipFile(a).namelist() == ['a b.txt']
    assert lines(a) == ['track_20001,ABC1234;0.0000', 'track_20002,ABC1234;0.1429', 'track_20003,ABC1234;0.2857']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a b.zip', 'c'] # nothing temporary is left


def test_the_tracks_of_the_test_part(competition):
    assert [t.key for t in _asked_tracks(competition)] == KEYS == [t.key for t in _asked_tracks(competition/'test')]
    (competition/'test/track_20002/lr-003.jpg').unlink()
    assert [t.key for t in _asked_tracks(competition)] == KEYS
    with pytest.raises(KdocrError, match='no test tracks in it'): _asked_tracks(competition/'train')
    shutil.copytree(competition/'test/track_20001', competition/'test/again/track_20001')
    with pytest.raises(KdocrError, match='two tracks are called track_20001'): _asked_tracks(competition)
    (competition/'x.csv').write_text('image,text\n')
    with pytest.raises(KdocrError, match="a submission is of a folder in the competition's layout"): _asked_tracks(competition/'x.csv')


def test_tracks_that_nobody_labels_are_a_test_part_by_any_name(competition, tmp_path, capsys):
    blind = shutil.copytree(competition/'test', tmp_path/'blind')
    assert [t.key for t in _asked_tracks(blind)] == KEYS
    assert main(['submit', str(blind), '--ckpt', str(checkpoint(tmp_path/'a.pth')), '--out', str(tmp_path/'s.zip')]) == 0 and len(lines(tmp_path/'s.zip')) == 3
    shutil.copytree(next(competition.glob('train/*/*/track_*')), blind/'track_00001')
    with pytest.raises(KdocrError, match='no test tracks in it .expected test/.* or tracks without annotations'): _asked_tracks(blind)


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize('text', [GOOD, GOOD.replace('\n', '\r\n'), GOOD.rstrip('\n'), GOOD.replace('0.5000', '1'), GOOD.replace('0.5000', '0'), GOOD.replace('0.5000', '9.9e-05'), GOOD.replace('ABC1D23', 'ABC1234')])
def test_what_is_accepted(competition, tmp_path, text):
    assert check_submission(packed(tmp_path/'s.zip', text), competition) == []


@pytest.mark.parametrize('old, new, said', [
    ('track_20002,ABC1D23;0.5000\n', '', ['track_20002: missing']),
    ('track_20002', 'track_20001', ['line 2: track_20001: a second time, it is on line 1 already', 'track_20002: missing']),
    ('track_20002', 'track_2', ['line 2: track_2: no such track', 'track_20002: missing']),
    ('track_20002,ABC1D23', 'track_20002,ABC1D2', ["line 2: track_20002: 'ABC1D2' is no plate"]),
    ('track_20002,ABC1D23', 'track_20002,ABC1D234', ["line 2: track_20002: 'ABC1D234' is no plate"]),
    ('track_20002,ABC1D23', 'track_20002,abc1d23', ["line 2: track_20002: 'abc1d23' is no plate"]),
    ('track_20002,ABC1D23', 'track_20002,1BC1D23', ["line 2: track_20002: '1BC1D23' is no plate"]),
    ('track_20002,ABC1D23', 'track_20002,', ["line 2: track_20002: '' is no plate"]),
    *((f'track_20002,ABC1D23;0.5000', f'track_20002,ABC1D23;{x}', [f"line 2: track_20002: confidence '{x}' is no number from 0 to 1"]) for x in ('nan', 'inf', '-0.1', '1.0001', '', 'high', ' 0.5', '0_5', '1e999', '0x1')),
    ('track_20002,ABC1D23;0.5000', 'track_20002;ABC1D23,0.5', ["line 2: 'track_20002;ABC1D23,0.5' is not `track,text;confidence`", 'track_20002: missing']),
    ('track_20003', '\ntrack_20003', ["line 3: '' is not `track,text;confidence`"]),
    ('track_20002,ABC1D23;0.5000', 'track_20002,' + 'x'*3000 + ';0.5', ["line 2: track_20002: '" + 'x'*76 + "...' is no plate"]),
    ('track_20002,ABC1D23;0.5000', 'x'*3000, ["line 2: '" + 'x'*76 + "...' is not `track,text;confidence`", 'track_20002: missing']),
    (GOOD, '', ["line 1: '' is not", 'track_20001: missing', 'track_20002: missing', 'track_20003: missing'])])
def test_lines(competition, tmp_path, old, new, said):
    assert GOOD.count(old) == 1
    got = faults(packed(tmp_path/'s.zip', GOOD.replace(old, new)), competition)
    assert len(got) == len(said) and all(g.startswith(s) for g, s in zip(got, said)), got


@pytest.mark.parametrize('make, said', [
    (lambda p: packed(p, None), '0 files in it (none); asked is one, a .txt'),
    (lambda p: packed(p, name='s.csv'), 's.csv in it; asked is a .txt, and in no folder'), (lambda p: packed(p, name='mine/s.txt'), 'mine/s.txt in it; asked is a .txt, and in no folder'), (lambda p: packed(p, name='../s.txt'), 'in no folder'),
    (lambda p: packed(p, **{'b.txt': GOOD}), '2 files in it (submission.txt, b.txt)'),
    (lambda p: packed(p, **{'__MACOSX/._submission.txt': 'x'}), '2 files in it'),
    (lambda p: p.write_text(GOOD), 'no zip, or a damaged or encrypted one'), (lambda p: p.write_bytes(b''), 'no zip'),
    (lambda p: p.write_bytes(packed(p).read_bytes()[:-30]), 'no zip, or a damaged or encrypted one'),
    (lambda p: p.write_bytes(packed(p).read_bytes().replace(b'ABC1D23', b'ABC1D24')), 'no zip, or a damaged or encrypted one'), # its check sum tells
    (lambda p: packed(p, '\ufeff' + GOOD), 'line 1: a character that no plate has (byte 0xef)'),
    (lambda p: packed(p, GOOD.replace('20002,A', '20002,Á')), 'line 2: a character that no plate has (byte 0xc3)'),
    (lambda p: packed(p, GOOD.replace('20003', '2000\x1b')), 'line 3: a character that no plate has (byte 0x1b)'), (lambda p: packed(p, GOOD.encode('utf-16-le')), 'line 1: a character that no plate has (byte 0x00)'),
    (lambda p: packed(p, GOOD.encode('utf-16')), 'line 1: a character that no plate has (byte 0xff)')])
def test_files(competition, tmp_path, make, said):
    make(tmp_path/'s.zip')
    got = faults(tmp_path/'s.zip', competition)
    assert len(got) == 1 and said in got[0]


@pytest.mark.parametrize('how', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_whatever_packed_it(competition, tmp_path, how):
    path = tmp_path/'s.zip'
    with zipfile.ZipFile(path, 'w') as z: z.writestr('s.txt', GOOD, how)
    assert faults(path, competition) == []
    raw = bytearray(path.read_bytes())
    for i in range(45, 60): raw[i] ^= 0x5a # behind the head
    path.write_bytes(raw)
    assert faults(path, competition) == ['no zip, or a damaged or encrypted one']


def test_a_text_that_fills_the_memory_is_not_unpacked(competition, tmp_path):
    with zipfile.ZipFile(tmp_path/'s.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('s.txt', b'0' * (65 << 20))
    assert (tmp_path/'s.zip').stat().st_size < 1e5 and 'bytes are no submission' in faults(tmp_path/'s.zip', competition)[0]


def test_the_commands_exit_status(competition, tmp_path, capsys):
    assert main(['submit', str(competition), '--check', str(packed(tmp_path/'s.zip'))]) == 0
    assert 'every track once' in capsys.readouterr().out
    assert main(['submit', str(competition), '--check', str(packed(tmp_path/'s.zip', GOOD.replace('0.5000', '2')))]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(['submit', str(competition), '--check', str(tmp_path/'nowhere.zip')]) == 2
    assert main(['submit', str(tmp_path/'nowhere'), '--check', str(tmp_path/'s.zip')]) == 2
    assert capsys.readouterr().err.splitlines() == [f'kdocr: {tmp_path}/nowhere.zip: No such file or directory', f'kdocr: {tmp_path}/nowhere: no such folder']


# ---------------------------------------------------------------- reading
def frames_of(folder): return [PlateInput(t.key, t.lr) for t in _asked_tracks(folder)]


def test_one_checkpoint_is_the_reader_itself(competition, tmp_path):
    for i, how in enumerate((dict(), dict(frames=5))):
        r = Reader.load(checkpoint(tmp_path/f'{i}.pth', seed=3, **how))
        tracks = [*frames_of(competition), PlateInput('two', frames_of(competition)[0].frames[:2])]  # of five frames and of two
        for got, want in zip(_read_together([r], tracks), r.read(tracks, layout='either'), strict=True):
            assert got.text == want.text and got.confidence == pytest.approx(want.confidence, rel=1e-4)


def test_averaging_is_the_mean_of_log_probabilities(competition, tmp_path):
    readers = [Reader.load(checkpoint(tmp_path/f'{i}.pth', seed=i)) for i in range(2)]
    tracks = frames_of(competition)
    assert [(r.text, r.confidence) for r in _read_together([readers[0]] * 2, tracks)] == [(r.text, pytest.approx(r.confidence)) for r in _read_together(readers[:1], tracks)]

    def says(x): return Reader(Network(lambda images: np.repeat(x, len(images), 0), dict(charset=Charset().chars, height=32, width=128, frames=2), 'it says what it is told'))
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(1, 16, 37)).astype(np.float32) * 4 for _ in range(2))
    both = says(((log_softmax(a) + log_softmax(b)) / 2).astype(np.float32))
    (got,), (want,), (other,) = (_read_together(r, tracks[:1]) for r in ([says(a), says(b)], [both], [says(a)]))
    assert got.text == want.text and got.confidence == pytest.approx(want.confidence, rel=1e-4)
    assert got.text != other.text or got.confidence != pytest.approx(other.confidence, rel=1e-2)


def test_the_temperature_counts(competition, tmp_path):
    path = checkpoint(tmp_path/'a.pth')
    cold = torch.load(path, weights_only=True) | dict(temperature=.05)
    save_checkpoint(tmp_path/'cold.pth', cold)
    sure, unsure = (_read_together([Reader.load(p)], frames_of(competition))[0].confidence for p in (tmp_path/'cold.pth', path))
    assert sure > unsure + .3


def test_what_cannot_be_averaged(competition, tmp_path, capsys):
    a = checkpoint(tmp_path/'a.pth')
    for i, (values, said) in enumerate([(dict(charset=Charset().chars[::-1]), 'charset'), (dict(width=256), 'time steps 32 and 16')]):
        b = checkpoint(tmp_path/f'b{i}.pth', **values)
        with pytest.raises(KdocrError, match=rf'b{i}\.pth and .*a\.pth cannot be averaged: {said}'): _agree({str(p): Reader.load(p) for p in (a, b)})
        assert main(['submit', str(competition), '--ckpt', str(a), str(b), '--out', str(tmp_path/'s.zip')]) == 2 and not (tmp_path/'s.zip').exists()
    with pytest.raises(KdocrError, match='words.pth: cannot read plates, 0123456789.* are not in its charset'): submit(competition, [checkpoint(tmp_path/'words.pth', charset='abc')])
    _agree({str(p): Reader.load(p) for p in (a, checkpoint(tmp_path/'higher.pth', height=48))}) # another height has the same steps


def test_submit(competition, tmp_path, capsys):
    ckpts = [str(checkpoint(tmp_path/f'{i}.pth', seed=i)) for i in range(2)]
    out = tmp_path/'ç b'/'mine.zip'
    assert main(['submit', str(competition), '--ckpt', *ckpts, '--out', str(out)]) == 0
    said = capsys.readouterr().out
    assert '3 tracks' in said and '2 checkpoints averaged; checked' in said and '3 whole tracks with a known text' in said
    got = [l.split(',') for l in lines(out)]
    assert [k for k, _ in got] == KEYS and all(layout_of(x.split(';')[0]) for _, x in got) and check_submission(out, competition) == []
    want = _read_together([Reader.load(c) for c in ckpts], frames_of(competition))
    assert [x for _, x in got] == [f'{r.text};{r.confidence:.4f}' for r in want]
    before = out.read_bytes()
    submit(competition/'test', ckpts, out, batch=2)
    assert out.read_bytes() == before


def test_the_folder_is_walked_once_and_a_place_is_asked_for_first(competition, tmp_path, monkeypatch):
    from kdocr.reader import recogniser, submit as module
    ckpt, walked, opened = checkpoint(tmp_path/'a.pth'), [], []
    monkeypatch.setattr(module, 'index_data', lambda f: (walked.append(f), index_data(f))[1])
    monkeypatch.setattr(recogniser, 'load_image', lambda p: (opened.append(p), load_image(p))[1])
    submit(competition, [ckpt], tmp_path/'s.zip')
    assert walked == [competition] and len(opened) == 15
    (tmp_path/'file').touch()
    with pytest.raises(KdocrError, match='could not be written'): submit(competition, [ckpt], tmp_path/'file'/'s.zip')
    assert len(opened) == 15 # nothing was read in vain


def test_what_fails_its_own_check_is_not_left(competition, tmp_path, monkeypatch):
    from kdocr.reader import submit as module
    monkeypatch.setattr(module, '_read_together', lambda readers, tracks: [Record('', text='ABC', frames=5)]*len(tracks))
    with pytest.raises(KdocrError, match="s.zip: not written, line 1: track_20001: 'ABC' is no plate"): submit(competition, [checkpoint(tmp_path/'a.pth')], tmp_path/'s.zip')
    assert {p.name for p in tmp_path.iterdir()} == {'a.pth', 'LRLPR-26'}


def test_frames_that_cannot_be_read(competition, tmp_path, capsys):
    ckpt, out = checkpoint(tmp_path/'a.pth'), tmp_path/'s.zip'
    (competition/'test/track_20001/lr-002.jpg').write_bytes(b'no picture')
    (competition/'test/track_20001/lr-004.jpg').unlink()
    submit(competition, [ckpt], out)
    assert 'track_20001: 3 of 5 frames can be read (1 missing; lr-002.jpg: not an image' in capsys.readouterr().err
    whole = [PlateInput('whole', [p for p in _asked_tracks(competition)[0].lr if p.name != 'lr-002.jpg'])]
    r = _read_together([Reader.load(ckpt)], whole)[0]
    assert lines(out)[0] == _submission_line('track_20001', r.text, r.confidence)
    before = out.read_bytes()
    for f in (competition/'test/track_20003').iterdir(): f.write_bytes(b'')
    with pytest.raises(KdocrError, match='not written, 1 of 3 tracks cannot be read at all.*--allow-unreadable'): submit(competition, [ckpt], out)
    assert out.read_bytes() == before and 'track_20003: none of 5 frames' in capsys.readouterr().err
    assert main(['submit', str(competition), '--ckpt', str(ckpt), '--out', str(out), '--allow-unreadable']) == 0
    assert lines(out)[2] == 'track_20003,AAA0000;0.0000' and lines(out)[:2] == [l for l in lines(out) if 'AAA0000' not in l]


def test_no_place_to_write(competition, tmp_path):
    ckpt = checkpoint(tmp_path/'a.pth')
    with pytest.raises(KdocrError, match='a folder, where a file is to be written'): submit(competition, [ckpt], tmp_path)
    with pytest.raises(KdocrError, match='s.txt: a submission is a .zip'): submit(competition, [ckpt], tmp_path/'s.txt')
    with pytest.raises(KdocrError, match='a.pth: given twice'): submit(competition, [ckpt, str(ckpt)], tmp_path/'s.zip')
    (tmp_path/'file').touch()
    with pytest.raises(KdocrError, match='could not be written'): submit(competition, [ckpt], tmp_path/'file'/'s.zip')
    with pytest.raises(KdocrError, match='nowhere.pth: no such checkpoint'): submit(competition, [tmp_path/'nowhere.pth'], tmp_path/'s.zip')


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason='the photographed plates are not here')
def test_photographs(tmp_path, capsys):
    out = submit(PHOTOGRAPHS/'test', [checkpoint(tmp_path/'a.pth')], tmp_path/'s.zip')
    assert len(lines(out)) == 226 and check_submission(out, PHOTOGRAPHS/'test') == [] and '226 tracks' in capsys.readouterr().out


def test_an_onnx_file_reads_as_its_checkpoint(competition, tmp_path):
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    from kdocr.reader.export import export
    ckpt = checkpoint(tmp_path/'a.pth')
    file = export(ckpt, data=competition)
    a, b = (lines(submit(competition, [p], tmp_path/f'{p.suffix}.zip')) for p in (ckpt, file))
    assert a == b and len(a) == 3
