"""What the tests of training share: a tiny embedded data set, drawn once, and the smallest useful config."""
from functools import cache
import tempfile

import torch

from kdocr.config import load_config
from kdocr.core import read_json

torch.set_num_threads(1)
SMALL = dict(synth_tracks=40, synth_test=6, val_frac=0.2, batch_size=8, steps=10, eval_every=4, checkpoint_every=3, log_every=5)


@cache
def drawn():
    "The folder of the embedded plates that all these tests train on."
    from kdocr.data.batches import open_data
    out = tempfile.mkdtemp(prefix='kdocr-plates-')
    open_data(load_config(out=out, **SMALL))
    return f'{out}/embedded'


def small(out, **values):
    return load_config(**{**SMALL, 'out': str(out), 'data': drawn(), **values})


def flags(**values):
    return [word for k, v in values.items() for word in (f'--{k}', str(v))]


def timeless(run):
    "The log without its clock."
    return [{k: v for k, v in r.items() if k != 'seconds'} for r in run.log.rows()]


def same(a, b):
    "Whether two nested states hold the same values, bit for bit."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def same_end(a, b):
    "Whether two runs ended in the same weights, optimizer, best checkpoint, log and scores."
    from kdocr.training.run_folder import load_checkpoint
    def state(path): return {k: v for k, v in load_checkpoint(path).items() if k != 'seconds'}
    def scores(run): return {k: v for k, v in read_json(run.scores).items() if k != 'seconds'}
    return same(state(a.last), state(b.last)) and same(state(a.best), state(b.best)) and timeless(a) == timeless(b) and scores(a) == scores(b)
