"""Decoding, against brute force: every text of a small lattice is weighed, and the decoders must find the best."""
import itertools, subprocess, sys
import numpy as np
import pytest
from kdocr.charset import Charset, fits, min_steps
from kdocr.core import KdocrError
from kdocr.decoding import (DECODERS, beam, constrained, decode, fit_temperature, grammar, greedy, log_mass,
                            _log_prob, log_softmax, _nll, sum_frames, vote_frames, reading_of)

SMALL, CS = Charset('AB01'), Charset()
TEXTS = [''.join(x) for n in range(6) for x in itertools.product(SMALL.chars, repeat=n) if min_steps(x) <= 5]
SPREADS = [0, .5, 1, 3, 20, 400] # of the logits: from no idea to certainty, and beyond what fp64 can hold as a number


def lattice(b, t, c, spread, seed=0): return log_softmax(spread*np.random.default_rng(seed).normal(size=(b, t, c)))

def truth(lp, texts, charset=SMALL): return np.stack([_log_prob(lp, [x]*len(lp), charset) for x in texts], 1)


@pytest.mark.parametrize('spread', [1, 5, 50])
def test_probability_of_a_text_is_that_of_the_lattice(spread):
    torch = pytest.importorskip('torch')
    from kdocr.distill.ctc import log_likelihood
    rng = np.random.default_rng(1)
    texts = ['', 'A', 'AAB1122', 'AAAAAAAA', *(''.join(rng.choice(list(CS.chars), 7)) for _ in range(20))]
    logits = spread*rng.normal(size=(len(texts), 16, 37))
    np.testing.assert_allclose(_log_prob(log_softmax(logits), texts, CS), log_likelihood(torch.tensor(logits), texts, CS).numpy(), rtol=1e-12)

def test_probabilities_of_all_texts_sum_to_one():
    np.testing.assert_allclose(np.exp(truth(lattice(30, 5, 5, 2), TEXTS)).sum(1), 1, rtol=1e-12)

def test_a_text_that_needs_more_steps_is_impossible():
    assert _log_prob(lattice(2, 5, 5, 1), ['AAA', 'AAAA'], SMALL)[1] == -np.inf

@pytest.mark.parametrize('spread', SPREADS)
@pytest.mark.parametrize('layout', ['LLD', 'LDL', 'L?D', 'LD|LLD', '?|??|???', '[A0]?', 'LLL', 'LL|L?|?[B-B]', 'DDLL'])
def test_constrained_finds_the_best_that_fits(layout, spread):
    lp, g = lattice(40, 5, 5, spread), grammar(layout, SMALL)
    fit = [x for x in TEXTS if SMALL.encode(x) in g]
    every, read = truth(lp, fit), constrained(lp, SMALL, layout, nodes=np.inf)
    assert set(read) <= set(fit)
    np.testing.assert_allclose(_log_prob(lp, read, SMALL), every.max(1), atol=1e-9)
    np.testing.assert_allclose(log_mass(lp, g), np.logaddexp.reduce(every, 1), rtol=1e-9, atol=1e-12)

def test_a_silent_network_is_left_in_time():
    "Blanks, and noise far below them: proof would take all texts; what comes out fits, and nothing that the bound allows is much better."
    x = 1e-3*np.random.default_rng(0).normal(size=(4, 16, 37)); x[..., 0] += 8
    lp, g = log_softmax(x), grammar('either', CS)
    read = constrained(lp, CS, nodes=50)
    from kdocr.decoding import _ahead
    assert all(CS.encode(r) in g for r in read) and (_ahead(lp, g)[1] - _log_prob(lp, read, CS) < .02).all()

def test_neighbours_alike_need_a_blank():
    "A alone for five steps is one A, however long: `LL` must be told apart by a blank, and pays for it."
    x = np.zeros((1, 5, 5)); x[:, :, 1] = 9 # 'A' at every step
    lp = log_softmax(x)
    assert greedy(lp, SMALL) == ['A'] and constrained(lp, SMALL, 'L') == ['A']
    fit = ['AA', 'AB', 'BA', 'BB']
    assert constrained(lp, SMALL, 'LL') == [fit[truth(lp, fit).argmax()]]
    assert _log_prob(lp, ['AA'], SMALL) < _log_prob(lp, ['A'], SMALL) - 5

def test_grammar_knows_the_layouts():
    g, rng = grammar('either', CS), np.random.default_rng(0)
    texts = [''.join(rng.choice(list(CS.chars), n)) for n in (6, 7, 8) for _ in range(50)] + ['ABC1234', 'ABC1D23', 'ABCD123', 'ABC12D3']
    assert [CS.encode(x) in g for x in texts] == [fits(x, 'Brazilian') or fits(x, 'Mercosur') for x in texts]
    assert [CS.encode('ABC1D23') in grammar(x, CS) for x in ('Mercosur', 'mercosur', 'LLLDLDD', 'Brazilian')] == [True, True, True, False]

@pytest.mark.parametrize('spread', SPREADS)
def test_every_constrained_reading_is_a_plate(spread):
    for read in constrained(lattice(8, 16, 37, spread), CS): assert fits(read, 'Brazilian') or fits(read, 'Mercosur')

def test_constrained_is_the_union_of_its_patterns():
    lp = lattice(20, 16, 37, 2)
    each = [_log_prob(lp, constrained(lp, CS, x), CS) for x in ('Brazilian', 'Mercosur')]
    np.testing.assert_allclose(_log_prob(lp, constrained(lp, CS), CS), np.maximum(*each), atol=1e-9)

def test_a_batch_reads_as_its_rows_do():
    lp = lattice(12, 16, 37, 3)
    for d in DECODERS: assert decode(lp, CS, d) == [decode(row[None], CS, d)[0] for row in lp]

@pytest.mark.parametrize('spread', [.5, 2, 8])
def test_a_wide_beam_finds_the_best(spread):
    lp = lattice(10, 4, 5, spread)
    np.testing.assert_allclose(_log_prob(lp, beam(lp, SMALL, 120), SMALL), truth(lp, [x for x in TEXTS if min_steps(x) <= 4]).max(1), atol=1e-9)

def test_a_wider_beam_finds_more():
    "Over many lattices a wider beam finds more probable texts; of width 10 most of the best."
    lp = lattice(200, 5, 5, 1)
    found = [(_log_prob(lp, beam(lp, SMALL, w), SMALL) > truth(lp, TEXTS).max(1) - 1e-9).mean() for w in (1, 3, 10)]
    assert found[0] < found[1] < found[2] and found[2] > .7

def test_greedy_is_what_training_reads():
    torch = pytest.importorskip('torch')
    from kdocr.distill.ctc import greedy_read as trained
    x = np.random.default_rng(0).normal(size=(50, 16, 37))
    assert greedy(log_softmax(x), CS) == [r.text for r in trained(torch.tensor(x), CS)]

@pytest.mark.parametrize('layout', ['', 'LLDD', 'LDL|LLD', '????'])
def test_confidences_are_shares_of_what_could_stand_there(layout):
    lp, g = lattice(6, 7, 5, 2), grammar(layout, SMALL) if layout else None
    texts = constrained(lp, SMALL, layout) if layout else ['A0B', 'AAB', '0', '', 'BB', '0000']
    fit = lambda x: g is None or SMALL.encode(x) in g
    for i, r in enumerate(reading_of(lp, texts, SMALL, layout)):
        p = lambda x: float(np.exp(_log_prob(lp[i:i + 1], [x], SMALL)[0])) if fit(x) else 0.
        assert r.confidence == pytest.approx(p(r.text)/(np.exp(log_mass(lp[i:i + 1], g)[0]) if g else 1), rel=1e-9)
        for k, share in enumerate(r.char_confidence):
            assert share == pytest.approx(p(r.text)/sum(p(r.text[:k] + c + r.text[k + 1:]) for c in SMALL.chars), rel=1e-9)

def test_confidences_of_all_that_fits_sum_to_one():
    lp, fit = lattice(1, 5, 5, 1), [x for x in TEXTS if SMALL.encode(x) in grammar('LD|D?', SMALL)]
    assert sum(reading_of(lp, [x], SMALL, 'LD|D?')[0].confidence for x in fit) == pytest.approx(1)
    assert reading_of(lp, ['AA'], SMALL, 'LD')[0].confidence == 0

@pytest.mark.parametrize('layout, said', [('AAA0000', "'A' is no place"), ('LLL-DDDD', "'-' is no place"), ('[ab', "no place"), ('', 'no places'), ('LLL|', 'no places'), ('Mercosul', "did you mean 'Mercosur'"), ('L[é]', 'nothing in the charset')])
def test_a_wrong_pattern_is_named(layout, said):
    with pytest.raises(KdocrError, match=said.replace('[', r'\[')): grammar(layout, CS)

def test_what_cannot_be_said_is_refused():
    with pytest.raises(KdocrError, match="layout 'either': nothing that fits can be said in 6 time steps"): constrained(lattice(2, 6, 37, 1), CS)
    with pytest.raises(KdocrError, match='a digit'): grammar('LD', Charset('AB'))
    with pytest.raises(KdocrError, match='NaN'): log_softmax([[np.nan, 1.]])
    with pytest.raises(KdocrError, match="did you mean 'greedy'"): decode(lattice(1, 16, 37, 1), CS, 'greddy')

def test_nothing_to_read_is_nothing_read():
    none = np.zeros((0, 16, 37))
    assert [decode(none, CS, d) for d in DECODERS] == [[], [], []] and reading_of(none, [], CS, 'either') == []

def test_frames_and_votes():
    lp = lattice(3, 5, 5, 2)
    np.testing.assert_allclose(sum_frames(lp), log_softmax(lp.sum(0)/3))
    assert vote_frames(['B', 'A', 'A'], [.9, .1, .1]) == 'A' and vote_frames(['B', 'A'], [.1, .2]) == 'A' and vote_frames(['A'], [0.]) == 'A'

@pytest.mark.parametrize('layout', ['', 'L|LD'])
def test_temperature_is_found(layout):
    "Texts are drawn from a network's own probabilities; it is then made too sure by a factor, which comes back."
    lp, rng = lattice(1500, 3, 5, 2), np.random.default_rng(0)
    fit = [x for x in TEXTS if min_steps(x) <= 3 and (not layout or SMALL.encode(x) in grammar(layout, SMALL))]
    p = np.exp(truth(lp, fit))
    texts = [fit[rng.choice(len(fit), p=row/row.sum())] for row in p]
    found = fit_temperature(log_softmax(2.5*lp), texts, SMALL, layout)
    assert found == pytest.approx(2.5, rel=.12)
    assert _nll(log_softmax(2.5*lp), texts, SMALL, layout, found) <= _nll(lp, texts, SMALL, layout) + 1e-3

def test_temperature_passes_over_what_cannot_be_said():
    lp = lattice(3, 5, 5, 1)
    assert fit_temperature(lp, [None, 'AAAA', None], SMALL) == 1 and fit_temperature(lp, ['AB', '0', '1'], SMALL, 'LD') == 1

def test_it_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None\nimport kdocr.decoding, kdocr.reader.recogniser, kdocr.cli; print('scipy' in sys.modules or 'pandas' in sys.modules)"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (r.returncode, r.stdout.strip()) == (0, 'False'), r.stderr
