"""A folder of labelled pictures: what it must say of itself, and how tall its pictures are seen."""
import numpy as np
import pytest
from PIL import Image

from kdocr.core import KdocrError
from kdocr.reader.heights import accuracy_by_height, labelled_folder, predict_at_height, downscale


def folder(path, raw, encoding='utf-8'):
    (path/'labels.csv').write_bytes(raw.encode(encoding))
    for name, h in (('a.png', 40), ('ü b.png', 12)): Image.fromarray(np.full((h, 3*h, 3), h, np.uint8)).save(path/name)
    return path


def test_a_folder_with_labels(tmp_path):
    for raw in ('file,text,layout\na.png,ABC1D23,Mercosur\nü b.png,ABC1234,\n', '\ufefffile,text\r\na.png,ABC1D23\r\nü b.png,ABC1234\r\n'): # the second as a spreadsheet saves it
        one, two = labelled_folder(folder(tmp_path, raw))
        assert (one.key, one.text, one.picture.shape, two.key, two.text, two.layout) == ('a.png', 'ABC1D23', (40, 120, 3), 'ü b.png', 'ABC1234', '')


@pytest.mark.parametrize('raw, said', [('file;text\na.png;X\n', 'columns file and text'), ('file,text\n', 'at least one row'), ('file,text\na.png,X\nü b.png,\n', 'row 2 lacks its file or its text'),
                                       ('file,text\na.png\n', 'row 1 lacks'), ('file,text\nc.png,X\n', 'c.png: No such file')])
def test_what_is_wrong_with_labels(raw, said, tmp_path):
    with pytest.raises(KdocrError, match=said): labelled_folder(folder(tmp_path, raw))


def test_labels_that_are_no_text(tmp_path):
    with pytest.raises(KdocrError, match='labels.csv: not a CSV in UTF-8'): labelled_folder(folder(tmp_path, 'file,text\nü b.png,X\n', 'latin-1'))
    (tmp_path/'labels.csv').unlink()
    with pytest.raises(KdocrError, match='labels.csv: missing'): labelled_folder(tmp_path)


def test_heights_are_counted_as_seen(tmp_path):
    pictures = labelled_folder(folder(tmp_path, 'file,text\na.png,X\nü b.png,Y\n'))
    def read(seen): return [('X', .5)]*len(seen)
    assert [p.height for p in predict_at_height(read, pictures, 16)[0]] == [16, 12] # nothing is made taller
    rows = accuracy_by_height(read, pictures, (None, 16), 'says X')
    assert [(r['reader'], r['height'], r['pictures'], r['exact'], r['cer']) for r in rows] == [('says X', 'as stored', 2, .5, .5), ('says X', 16, 2, .5, .5)]
    assert downscale(pictures[0].picture, 10).shape == (10, 30, 3) and downscale(pictures[1].picture, 24) is pictures[1].picture
