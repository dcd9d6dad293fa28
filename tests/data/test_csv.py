"""Any other text: a CSV of pictures and a charset file in place of the competition's layout."""
import json

import cv2
import numpy as np
import pytest
import torch

from conftest import write_track
from kdocr.charset import Charset, read_charset
from kdocr.cli import main
from kdocr.config import load_config
from kdocr.core import KdocrError, read_json
from kdocr.data.batches import open_data
from kdocr.data.check import check, text_faults
from kdocr.data.icpr import hidden_folder, index_data
from kdocr.data.pack import _open_pack
from kdocr.data.split import make_split
from kdocr.training.command import train_command as train_kd

WORDS = ['ab', 'né', 'ñandú', 'a-b', 'bb', 'ça va', 'été', 'da', 'ébène', 'nu', 'd-é', 'vue']
CHARS = 'abdenuvtç éèñú-'


def picture(path, text, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = cv2.putText(np.full((40, 120, 3), 215, np.uint8), str(sum(map(ord, text))), (8, 30), cv2.FONT_HERSHEY_SIMPLEX, 1, (30, 30, 30), 2)
    cv2.imwrite(str(path), cv2.resize(im, size, interpolation=cv2.INTER_AREA))


def write(path, rows, columns='hr,lr,text'): path.write_text('\n'.join([columns, *rows]) + '\n', encoding='utf-8'); return path


@pytest.fixture
def words(tmp_path):
    "Twelve pairs of pictures of words, in folders with spaces and other letters, and their charset."
    root = tmp_path/'mes données'
    for i, w in enumerate(WORDS): picture(root/f'près/{i}.png', w, (120, 40)); picture(root/f'loin/{i}.jpg', w, (40, 14))
    (root/'chars.txt').write_text('\n'.join(CHARS) + '\n', encoding='utf-8')
    return write(root/'pairs.csv', [f'près/{i}.png,loin/{i}.jpg,{w}' for i, w in enumerate(WORDS)])


def faults(path): return [str(f).removeprefix(f'{path}:') for f in index_data(path).faults]


# ---------------------------------------------------------------- charset
def test_a_charset_file_in_one_line_or_many(tmp_path):
    for text in ('ab-é ', 'a\nb\n-\né\n \n', '\ufeffa\r\nb-\r\ne\u0301\r\n '):
        (tmp_path/'c.txt').write_bytes(text.encode())
        assert read_charset(tmp_path/'c.txt') == 'ab-é '
    assert load_config(charset=str(tmp_path/'c.txt')).charset == 'ab-é ' # the run's config holds the characters, and needs no file


@pytest.mark.parametrize('raw, said', [(b'aba', "'a' stands in it more than once"), (b'', 'empty'), (b'a\tb', 'cannot be seen'), (b'\xff\xfe', 'not a text in UTF-8')])
def test_a_charset_file_of_something_else(tmp_path, raw, said):
    (tmp_path/'c.txt').write_bytes(raw)
    with pytest.raises(KdocrError, match=rf'c\.txt: .*{said}'): read_charset(tmp_path/'c.txt')


def test_a_charset_file_that_is_not_there():
    with pytest.raises(KdocrError, match='nowhere.txt: No such file'): load_config(charset='nowhere.txt')
    assert load_config(charset='abc').charset == 'abc'


# ---------------------------------------------------------------- the list
def test_pairs(words):
    found = index_data(words)
    assert not found.faults and [t.text for t in found.train] == WORDS and not found.test and not found.val
    assert found.train[2].hr == (words.parent/'près/2.png',) and found.train[2].lr == (words.parent/'loin/2.jpg',)
    assert [k for k in found.pictures.values()] == ['lr', 'hr'] * 12
    assert text_faults(found, Charset(CHARS), 16) == {}
    again = index_data(words)
    assert again.fingerprint == found.fingerprint
    write(words, [f'près/{i}.png,loin/{i}.jpg,{w}' for i, w in enumerate(WORDS[:-1])])
    assert index_data(words).fingerprint != found.fingerprint


def test_frames_of_a_track_and_parts(words):
    rows = [f'près/{i}.png,loin/{i}.jpg,{"ab" if i < 3 else WORDS[i]},{"t1" if i < 3 else ""},{s},{c}'
            for i, s, c in [(0, '', 'dry'), (1, '', 'dry'), (2, '', 'dry'), (3, 'train', 'wet'), (4, 'val', 'wet'), (5, 'test', 'wet')]]
    found = index_data(write(words, rows, 'hr,lr,text,track,split,scenario'))
    assert not found.faults and [t.key for t in found.train] == ['t1', 'loin/3.jpg', 'loin/4.jpg'] and [t.key for t in found.test] == ['loin/5.jpg']
    assert [p.name for p in found.train[0].lr] == ['0.jpg', '1.jpg', '2.jpg'] and [p.name for p in found.train[1].lr] == ['3.jpg'] * 3
    assert found.val == {'loin/4.jpg'} and {t.scenario for t in found.train} == {'dry', 'wet'}
    assert make_split(found.train, named=found.val).val == ('loin/4.jpg',)
    data = open_data(load_config(data=words, charset=CHARS, out=words.parent/'out', batch_size=2))
    assert data.train.pack.lr.shape[:2] == (3, 3) and data.split.val == ('loin/4.jpg',) and len(data.test) == 1
    assert data.val.batch(torch.zeros(1, dtype=int), frames=5).images.shape[1] == 3
    with pytest.raises(KdocrError, match='frames: 4; a track has 1 to 3'): open_data(load_config(data=words, charset=CHARS, out=words.parent/'out', frames=4))


def test_a_text_that_validates_trains_nowhere(words):
    rows = [f'près/{i}.png,loin/{i}.jpg,{w},{s}' for i, (w, s) in enumerate([('ab', ''), ('ab', 'val'), ('bb', ''), ('da', 'val'), ('da', 'test')])]
    found = index_data(write(words, rows, 'hr,lr,text,split'))
    split = make_split(found.train, test_texts={'da'}, named=found.val)
    assert (split.train, split.val, split.left_out) == (('loin/2.jpg',), ('loin/1.jpg',), ('loin/0.jpg', 'loin/3.jpg'))


def test_a_validation_part_that_the_data_change_later_is_refused(words):
    def rows(v): return [f'près/{i}.png,loin/{i}.jpg,{w},{"val" if i == v else ""}' for i, w in enumerate(WORDS)]
    open_data(cfg := load_config(data=write(words, rows(1), 'hr,lr,text,split'), charset=CHARS, out=words.parent/'out'))
    assert open_data(cfg).split.val == ('loin/1.jpg',)
    write(words, rows(2), 'hr,lr,text,split')
    with pytest.raises(KdocrError, match='split.json: it validates other tracks than the data name'): open_data(cfg)
    write(words, rows(None), 'hr,lr,text,split')
    with pytest.raises(KdocrError, match='split.json: it validates other tracks than the data name'): open_data(cfg)


def test_pictures_without_partners_get_lr_frames_drawn(words):
    write(words, [f'près/{i}.png,{w}' for i, w in enumerate(WORDS)], 'image,text')
    found = index_data(words)
    assert not found.faults and found.train[0].lr == () and len(found.train[0].hr) == 1 and found.train[0].key == 'près/0.png'
    data = open_data(load_config(data=words, charset=CHARS, out=words.parent/'out', mode='student', distill_weight=0))
    pack = data.train.pack
    assert pack.lr.shape == pack.hr.shape == (12, 1, 32, 128, 3) and (pack.lr != pack.hr).any() and (pack.heights['lr'] < 40).all() and (pack.heights['hr'] == 40).all()


def test_lr_alone_serves_a_reader_and_no_teacher(words):
    write(words, [f'loin/{i}.jpg,{w}' for i, w in enumerate(WORDS)], 'lr,text')
    base = dict(data=words, charset=CHARS, out=words.parent/'out')
    assert open_data(load_config(**base, mode='student', distill_weight=0, clean_hr_guided=False)).train.pack.hr is None
    with pytest.raises(KdocrError, match='these tracks have no HR frames'): open_data(load_config(**base))


# ---------------------------------------------------------------- what is wrong with it, by line
@pytest.mark.parametrize('columns, said', [('hr,lr,txt', "column 'txt': did you mean 'text'"), ('hr,text,text', 'two columns are called text'), ('lr,hr', 'needed are the columns hr,lr,text or image,text; there are lr,hr'),
                                           ('text', 'needed are the columns'), ('image,lr,text', 'image is a picture without a partner'), ('hr,lr,text', 'no rows')])
def test_columns(tmp_path, columns, said):
    with pytest.raises(KdocrError, match=rf'x\.csv: .*{said}'): index_data(write(tmp_path/'x.csv', [], columns))


def test_columns_in_capitals(words):
    write(words, [f'près/{i}.png,loin/{i}.jpg,{w}' for i, w in enumerate(WORDS)], 'HR, LR ,Text')
    assert not index_data(words).faults and len(index_data(words).train) == 12


@pytest.mark.parametrize('mark', [';', '\t', '|'])
def test_cells_that_no_comma_divides(tmp_path, mark):
    with pytest.raises(KdocrError, match='x.csv: its cells are divided by .*; a comma is needed'): index_data(write(tmp_path/'x.csv', [], f'hr{mark}lr{mark}text'))


def test_not_a_csv(tmp_path):
    (tmp_path/'x.csv').write_bytes(b'hr,lr,text\n\xff,a,b\n')
    with pytest.raises(KdocrError, match='x.csv: not a CSV in UTF-8'): index_data(tmp_path/'x.csv')


def test_bad_rows_are_named_with_their_line(words):
    (words.parent/'empty.png').touch()
    rows = ['près/0.png,loin/0.jpg,ab,,', 'près/99.png,loin/1.jpg,da,,', 'près/2.png,loin/2.jpg,,,', 'empty.png,loin/3.jpg,nu,,', 'près/4.png,loin/0.jpg,ab,,', ',loin/5.jpg,ab,,',
            'près/6.png,loin/6.jpg,ab,,vall', 'près/7.png,loin/7.jpg', 'près/8.png,loin/8.jpg,ab,t,', 'près/9.png,loin/9.jpg,bb,t,']
    found = index_data(write(words, rows, 'hr,lr,text,track,split'))
    assert faults(words) == ['3: près/99.png: No such file or directory', '4: the text is empty', '5: empty.png: empty file (0 bytes)', '6: loin/0.jpg is on line 2 already', '7: no path under hr',
                             "8: split 'vall': did you mean 'val'?", '9: 2 cells, the header has 5', '9: the text is empty', "11: text 'bb', but an earlier row of track 't' has 'ab'"]
    assert not found.train # the first picture stands on two lines: nobody knows which is meant


def test_a_path_that_no_file_can_have(words):
    write(words, ['près/0\0.png,loin/0.jpg,ab', 'près/1.png'])
    assert faults(words) == ['2: près/0\0.png: no path: there is a NUL in it', '3: 1 cell, the header has 3', '3: the text is empty', '3: no path under lr']


def test_a_name_on_disk_is_taken_as_it_is(words):
    "A decomposed ü in a file's name is not the composed one; in a text it is."
    picture(words.parent/'u\u0308.png', 'nu', (120, 40))
    found = index_data(write(words, ['u\u0308.png,e\u0301te\u0301'], 'image,text'))
    assert not found.faults and found.train[0].text == 'été'


def test_more_than_five_frames(words):
    assert faults(write(words, [f'près/{i}.png,loin/{i}.jpg,ab,t' for i in range(6)], 'hr,lr,text,track')) == ["7: track 't' has 5 frames already"]


def test_texts_that_cannot_be_learnt(words):
    rows = ['près/0.png,loin/0.jpg,ab', 'près/1.png,loin/1.jpg,aXb', 'près/2.png,loin/2.jpg,' + 'ab' * 9, 'près/3.png,loin/3.jpg,' + 'b' * 9]
    cfg = dict(data=write(words, rows), charset=CHARS, out=words.parent/'out')
    with pytest.raises(KdocrError) as e: open_data(load_config(**cfg))
    assert "pairs.csv:3: 'aXb': the character 'X' is not in the charset" in str(e.value)
    assert "pairs.csv:4: 'ababababababababab' needs 18 CTC steps, the model has 16" in str(e.value) and "pairs.csv:5: 'bbbbbbbbb' needs 17 CTC steps" in str(e.value)
    rows += ['près/4.png,loin/4.jpg,ba', 'près/5.png,loin/5.jpg,nu']
    data = open_data(load_config(**cfg | dict(data=write(words, rows)), skip_faulty=True, width=128))
    assert {*data.train.texts, *data.val.texts} <= {'ab', 'ba', 'nu'} and len(data.train) + len(data.val) == 3 - len(set(data.split.left_out))
    assert not text_faults(index_data(words), Charset(CHARS + 'X'), 24)


def test_recombine_is_for_plates(words):
    with pytest.raises(KdocrError, match=r"recombine_p: .* 'ab' is no plate .*pairs.csv:2"): open_data(load_config(data=words, charset=CHARS, out=words.parent/'out', recombine_p=.3))
    write(words, [f'près/{i}.png,loin/{i}.jpg,{w}' for i, w in enumerate(['ABC1234', 'DEF5G67', 'HIJ8901'])])
    assert open_data(load_config(data=words, out=words.parent/'out', recombine_p=.3, val_frac=.4)).train.recombine_p == .3


def test_check_from_the_command_line(words, capsys):
    assert main(['check', str(words), '--charset', str(words.parent/'chars.txt')]) == 0
    out = capsys.readouterr().out
    assert '12 training tracks' in out and 'text lengths: 2 (5 tracks)' in out and '0 faults' in out and 'Scenario' not in out
    (words.parent/'loin/3.jpg').write_bytes((words.parent/'loin/3.jpg').read_bytes()[:200])
    assert main(['check', str(words), '--charset', 'abdenuvt']) == 1
    out = capsys.readouterr().out
    assert 'loin/3.jpg: truncated JPEG' in out and "pairs.csv:3: 'né': the character 'é' is not in the charset" in out


# ---------------------------------------------------------------- the whole way
def test_teacher_and_student_of_another_charset(words, capsys):
    assert main(['pack', str(words)]) == 0
    pack = next((hidden_folder(words)/'.kdocr').glob('train-*'))
    assert _open_pack(pack).lr.shape == (12, 1, 32, 128, 3)
    out = words.parent/'résultats'
    flags = ['--data', str(words), '--charset', str(words.parent/'chars.txt'), '--out', str(out), '--steps', '4', '--batch-size', '4', '--val-frac', '.3', '--eval-every', '2', '--device', 'cpu']
    assert train_kd([*flags, '--mode', 'teacher', '--name', 'lehrer']) == 0
    assert train_kd([*flags, '--mode', 'student', '--name', 'schüler', '--teacher-ckpt', str(out/'lehrer_best.pth'), '--distill-weight', '.5']) == 0
    assert 'right' in capsys.readouterr().out
    assert len([*(hidden_folder(words)/'.kdocr').glob('train-*')]) == 1 # the pack that was there served
    for run in ('lehrer', 'schüler'):
        scores = read_json(out/run/'scores.json')
        assert 2 <= scores['val']['n'] <= 5 and 0 <= scores['val']['exact_match'] <= 1 and scores['step'] in (2, 4)
    rows = [json.loads(l) for l in (out/'schüler'/'metrics.jsonl').read_text().splitlines()]
    assert [r['step'] for r in rows if 'kd_logits' in r] == [1, 2, 3, 4] and all(np.isfinite(r['loss']) for r in rows if 'loss' in r)
    assert read_json(hidden_folder(words)/'split.json')['hash'] and not (words.parent/'split.json').exists()


def test_a_folder_is_as_it_was(competition):
    "The competition's layout goes its old way."
    assert not index_data(competition).lines and hidden_folder(competition) == competition
    report = check(competition)
    assert not report.faults and 'train Scenario-B' in str(report)
    write_track(competition/'test/track_30001', 'ABC1234', '.jpg', hr=False)
    assert [t.text for t in index_data(competition).test][-1] is None
