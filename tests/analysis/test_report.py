"""What a report is made of: the runs that can be compared, each other one named; the summary in words, tables and figures."""
import matplotlib
matplotlib.use('agg')
import pytest
from pathlib import Path
from kdocr.core import KdocrError, read_json, write_json
from kdocr.config import Config
from kdocr.metrics import Prediction
from kdocr.training.run_folder import RunFolder
from kdocr.analysis.finished_runs import Run
from kdocr.analysis.report import _chosen, _described, _first_screen, _made_of, _readable, _summary_html, page

FACTS = dict(data_fingerprint='aa', split_hash='bb', torch='2.13')

@pytest.fixture
def results(tmp_path):
    "Two arms of three seeds, and what does not fit beside them."
    def run(name, right, n=100, finish=True, **kw):
        cfg = Config(**{**dict(name=name, out=tmp_path/'results', mode='student', teacher_checkpoint='t.pth'), **kw})
        r = RunFolder(cfg.out/name)
        r.claim(cfg, {}, dict(FACTS))
        if finish: r.finish({'test': [Prediction(f't{i}', f'A{i}', f'A{i}' if i < right else '', .9) for i in range(n)]})
        return r
    for arm, right in (('ctc', (60, 58, 62)), ('soft', (70, 69, 71))):
        for seed, k in enumerate(right): run(f'{arm}_{seed}', k, arm=arm, seed=seed, control='ctc', distill_weight=float(arm == 'soft'))
    run('begun', 0, finish=False)
    other = run('other_data', 50, arm='other')
    write_json(other.env, dict(read_json(other.env), data_fingerprint='cc'))
    run('other_tracks', 5, n=10, arm='few')
    write_json(run('listed', 50, arm='listed').env, ['no names'])
    run('damaged', 50, arm='damaged').config.write_text('a: [')
    (tmp_path/'results/junk').mkdir()
    (tmp_path/'results/file').write_text('x')
    return tmp_path/'results'

def test_what_does_not_fit_is_named_and_the_rest_goes_on(results, tmp_path):
    runs, said = _readable([results, results/'soft_0', results/'junk', tmp_path/'nowhere'])   # a folder of runs, one of them again, and two that are none
    assert [r.path.name for r in runs] == ['ctc_0', 'ctc_1', 'ctc_2', 'soft_0', 'soft_1', 'soft_2']
    for name, why in (('begun', 'not finished'), ('other_data', 'other data'), ('other_tracks', 'other held-out tracks'), ('listed', 'no names and values'), ('damaged', 'not valid YAML'), ('junk', 'not a run folder'), ('nowhere', 'not a run folder')):
        assert sum(f'/{name}' in l and why in l for l in said) == 1, (name, said)
    assert len(said) == 7

def test_nothing_to_report_on_is_an_error(results):
    with pytest.raises(KdocrError, match='begun: this run is not finished'): _readable([results/'begun'])
    with pytest.raises(KdocrError, match='no run was named'): _readable([])

def test_the_summary_holds_the_gains_as_a_figure_and_a_number_beside_its_unit(results, tmp_path):
    runs, _ = _readable([results])
    page = '\n'.join(_summary_html(runs, tmp_path/'figures'))
    assert {p.name for p in (tmp_path/'figures').iterdir()} == {f'{n}.{k}' for n in ('arms', 'gains') for k in ('png', 'pdf')} and page.count('<img') == 2
    assert '70.0&nbsp;% exact match' in page and '+10.0&nbsp;points' in page and page.count('<figcaption>') == 2

def test_the_small_print_says_once_what_all_share(results):
    runs, _ = _readable([results])
    said = _made_of(runs)
    assert said.count('2.13') == 1 and 'All 6 runs: data_fingerprint aa, split_hash bb, torch 2.13.' in said and said.count('<tr') == 7
    write_json(RunFolder(runs[0].path).env, dict(read_json(RunFolder(runs[0].path).env), torch='2.6'))
    said = _made_of(runs)
    assert said.count('2.13') == 5 and said.count('>2.6<') == 1 and 'All 6 runs: data_fingerprint aa, split_hash bb.' in said

def test_the_first_screen_answers_with_seeds_tiles_and_a_sentence(results):
    runs, _ = _readable([results])
    lead, badge, tiles, strip = _first_screen(runs)
    assert 'soft +10.0&nbsp;points' in lead and '; better)' in lead
    assert '3 seeds per arm' in badge and 'few' not in badge and tiles.count('<b>') == 2 and '60.0&nbsp;%' in tiles
    assert strip == '', 'its data are gone'

def test_the_first_screen_without_a_control_or_with_one_seed_says_so(results):
    runs, _ = _readable([results])
    lead, badge, tiles = _first_screen([r for r in runs if r.cfg.arm == 'soft'])
    assert 'Best of 1 arms' in lead and '3 seeds' in badge and tiles == ''
    lead, badge, *_ = _first_screen([r for r in runs if r.cfg.seed == 0])
    assert 'not enough seeds to say' in lead and '1 seed per arm: compares weights, not methods' in badge

def test_every_picture_is_described_and_the_page_fits_a_phone_and_the_dark():
    seen = page('T', _described('<h2 id="a">A &amp; B</h2><p><img src="1" alt="x"/></p><h3>C</h3><img src="2">'))
    assert 'alt="Figure: A &amp; B"' in seen
    assert 'alt="Figure: C"' in seen and '<a href="#a">' in seen
    assert 'prefers-color-scheme: dark' in seen and 'max-width: 480px' in seen and '@media print' in seen and 'sticky' in seen

def test_the_first_screen_hides_no_loss():
    def arm(name, right, **kw):
        rows = [Prediction(f't{i}', f'A{i}', f'A{i}' if i in right else '', .9) for i in range(40)]
        return Run(Path(name), Config(name=name, arm=name, mode='student', teacher_checkpoint='t.pth', **kw), {'test': rows})
    runs = [arm('ctc', range(20), distill_weight=0), arm('worse', range(10), control='ctc'), arm('better', range(30), control='ctc', lr=.003, distill_terms='kl')]
    lead, _, tiles, _ = _first_screen(runs)
    assert 'worse -25.0&nbsp;points' in lead and 'better +25.0&nbsp;points' in lead, 'every pair is in the sentence'
    assert 'worse: -25.0&nbsp;points' in tiles, 'the first arm, not the one with the largest gain'
    control, distilled = arm('c', {1, 2, 3}).preds, arm('d', {3}).preds
    assert _chosen(control, distilled)[0] == 't1', 'a plate that only the control reads, where there is one'
    assert _chosen(arm('c', {1}).preds, arm('d', {2, 3, 4}).preds)[:2] == ['t2', 't1']
