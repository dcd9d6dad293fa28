"""Nothing that a user can compute has changed: each step's losses, and the shipped reader's readings, bit for bit as at commit a14de01."""
import gzip
import hashlib
import json
import platform
from pathlib import Path

import pytest
import torch

from kdocr.config import load_config
from kdocr.data.batches import open_data
from kdocr.reader.recogniser import Reader
from kdocr.training.train_kd import train_kd

pytestmark = pytest.mark.slow
GOLDEN = json.loads(gzip.decompress((Path(__file__).resolve().parent.parent/'golden/a14de01.json.gz').read_bytes()))
SMALL = dict(synth_tracks=40, synth_test=6, val_frac=0.2, batch_size=8, steps=12, eval_every=4, checkpoint_every=3, log_every=5)
STUDENTS = dict(
    distilled=dict(), control=dict(distill_weight=0.), cached=dict(n_fixed_augs=2, teacher_cache='on'),
    warm_mixed=dict(student_init='teacher', student_input='mix', n_degraded=2, lowres_aug_p=.3, hr_mix_p=.2, recombine_p=.3, ema=.9,
                    label_frac=.5, unlabelled='pseudo_label', pseudo_label_conf=0.),
    terms=dict(distill_terms='backbone_out:cosine,transformer_out:attention*0.5@warmup(0.2),logits:kl(temperature=2),logits:dkd',
               grad_balance=.5),
    frames=dict(frames=3, mutual_weight=.1))


def cpu():
    "The processor's name with a digest of its features: two machines of one name may multiply in different orders."
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').is_file() else []
    found = {k: next((l.split(':', 1)[1].strip() for l in lines if l.startswith(k)), '') for k in ('model name', 'flags')}
    features = hashlib.sha256(' '.join(sorted(found['flags'].split())).encode()).hexdigest()[:12]
    return f"{found['model name'] or platform.machine()}, features {features}"


here = dict(cpu=cpu(), torch=torch.__version__)
if any(here[k] != GOLDEN[k] for k in here):
    pytest.skip(f'recorded on {GOLDEN["cpu"]} with torch {GOLDEN["torch"]}, here is {here["cpu"]} with torch {here["torch"]}', allow_module_level=True)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Embedded plates and a teacher."
    out = tmp_path_factory.mktemp('golden')
    open_data(load_config(out=out, **SMALL))
    return out, train_kd(load_config(out=out, data=out/'embedded', mode='teacher', name='teacher', **SMALL))


def same_losses(run, name):
    "Every value of every row, but the clock's, to the last bit."
    rows = [{k: v.hex() if isinstance(v, float) else v for k, v in row.items() if k != 'seconds'} for row in run.log.rows()]
    assert rows == GOLDEN['losses'][name]


def test_the_teacher(place): same_losses(place[1], 'teacher')


@pytest.mark.parametrize('name', STUDENTS)
def test_students(place, name):
    out, teacher = place
    settings = dict(SMALL, mode='student', teacher_checkpoint=str(teacher.published), grad_log_every=3, **STUDENTS[name])
    same_losses(train_kd(load_config(out=out, data=out/'embedded', name=name, **settings)), name)


def test_the_shipped_reader(place):
    paths = [place[0]/r['path'] for r in GOLDEN['readings']]
    for record, want in zip(Reader.load().read(paths), GOLDEN['readings']):
        got = dict(text=record.text, confidence=round(record.confidence, 4), char_confidence=[round(c, 4) for c in record.char_confidence])
        assert got == {k: v for k, v in want.items() if k != 'path'}
