"""What the tests of figures share: a style that is put back, a small network with what it computes, and what an axes shows."""
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from kdocr.analysis.figures import use_style
from kdocr.analysis.probe import probe
from kdocr.models.restran import make_model

ARMS = ['random init, control', 'random init, distilled', "teacher's weights, distilled"]
PLATE = np.zeros((32, 128, 3))


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def said(ax): return [t.get_text() for t in ax.texts]
def lines(ax): return [l for l in ax.lines if not l.get_label().startswith('_')]
def hexed(c): return matplotlib.colors.to_hex(c).upper()


@pytest.fixture(autouse=True)
def closed():
    torch.set_num_threads(1)
    with matplotlib.rc_context():
        use_style()
        yield
    plt.close('all')


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return make_model('restran_tiny').eval()


@pytest.fixture(scope='module')
def seen(model): return probe(model, randn(5, 3, 3, 32, 128), chunk=2)
