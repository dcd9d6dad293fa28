"""The bench: rows and ratios, the plain training it compares with, many tracks out of few, and all of it in its smallest form."""
import json, math
from types import SimpleNamespace
import pytest
import torch
from kdocr.data.augment import apply_light, draw_geometry, draw_light, warp
from kdocr.analysis.bench import (_COMPARED, _PlainPairs, Sizes, _anonymous, _apart, _inputs, _plain_loader, _plan,
                                  _row, _trainer, _training, _turn, bench, _bench_configs, _in_turns, _multiply,
                                  _plain_loss, _plain_steps, plot_bench, ratios, summary, table_text)
from kdocr.charset import Charset
from kdocr.core import KdocrError
from kdocr.distill.ctc import ctc_loss
from kdocr.data.batches import open_data, to_input
from kdocr.data.check import check
from kdocr.data.icpr import index_data, read_image
from kdocr.jobs.notebooks import run_notebook
from kdocr.data.pack import fit
from kdocr.training.networks import load_teacher, new_projections, new_student
from kdocr.training.run_folder import load_checkpoint
from kdocr.data.synth import synth

TRAINED = ['CTC', 'live teacher', 'cached teacher']
FIELDS = {'measure', 'arm', 'round', 'value', 'unit', 'n'}
ABOUT = dict(cpu='a cpu', cores=2, load=[0., 0., 0.], device='cpu', device_name='x', torch='2')
TINY = Sizes(tracks=30, rounds=2, batches=2, steps=1, batch_size=8, big='restran_tiny', big_batch=2, big_rounds=2, big_threads=(1,), grow=(20, 40), grow_rounds=1)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "The bench's folder, with drawn plates."
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp('bench')
    synth(place/'plates', tracks=30, test=0, seed=0)
    return place

def rows(measure, unit='tracks/s', **arms): return [_row(measure, a, r, v, unit, 64) for a, values in arms.items() for r, v in enumerate(values)]


def test_arms_take_turns_in_a_rotating_order_and_the_first_round_is_thrown_away():
    seen = []
    kept = list(_in_turns({a: lambda a=a: seen.append(a) or a.upper() for a in 'abc'}, 3))
    assert len(seen) == 12 and [a for _, a, _ in kept] == seen[3:] == list('abcbcacab')
    assert [r for r, _, _ in kept] == [0] * 3 + [1] * 3 + [2] * 3 and all(v == a.upper() for _, a, v in kept)

def test_a_turn_does_not_count_its_first_step():
    steps = iter(range(100))
    assert _turn(steps, 4, torch.device('cpu')) >= 0 and next(steps) == 5

def test_ratios_are_taken_within_a_round():
    f = ratios(rows('step', **{'CTC': [10, 1, 30], 'CTC, reference style': [5, 1, 10], 'live teacher': [4, 4, 4]}))
    first = f.iloc[0]
    assert (first.arm, first.base, first['median'], first.lo, first.hi, first.rounds) == ('CTC', 'CTC, reference style', 2, 1.5, 2.5, 3)
    assert list(zip(f.arm, f.base)) == [('CTC', 'CTC, reference style'), ('live teacher', 'CTC')] and set(zip(f.arm, f.base)) <= set(_COMPARED)

def test_ratios_of_rates_only_and_of_what_was_measured():
    assert ratios(rows('memory', 'MB', **{'CTC': [1], 'live teacher': [2]})).empty and ratios(rows('step', CTC=[1, 2])).empty

def test_a_summary_keeps_its_measures_together():
    f = summary(rows('a', x=[1, 2, 3, 4]) + rows('b', x=[5]) + rows('a', y=[7]))
    assert list(zip(f.measure, f.arm)) == [('a', 'x'), ('a', 'y'), ('b', 'x')]
    assert f.iloc[0][['median', 'lo', 'hi', 'rounds']].tolist() == [2.5, 1.75, 3.25, 4]

def test_the_table_names_the_machine_and_every_arm_and_the_figure_draws_without_ratios():
    records = rows('step of restran_tiny, 1 thread', CTC=[10, 12]) + rows('memory', 'MB', CTC=[300])
    found = dict(machine=ABOUT, notes=['a note'], ratios=ratios(records).to_dict('records'), summary=summary(records).to_dict('records'))
    said = table_text(found)
    assert said.startswith('a cpu, 2 cores') and said.endswith('a note') and '11' in said and '10.5 to 11.5' in said and said.count('CTC') == 2
    assert len(plot_bench(found).figure.axes) == 1
    json.dumps(found, allow_nan=False)


def test_the_plain_loader_sees_what_the_pack_holds(place):
    cfg = _bench_configs(place, frames=5, aug_strength=0.)['live teacher']
    data, tracks = open_data(cfg), {t.key: t for t in index_data(place/'plates').train}
    files = _PlainPairs([tracks[k] for k in data.train.keys], cfg, train=False)
    batch = data.train.batch(torch.arange(len(data.train)), frames=5)
    for i in range(len(files)):
        assert torch.equal(files[i]['images'], batch.images[i]) and torch.equal(files[i]['clean_hr'], batch.clean_hr[i]) and files[i]['texts'] == batch.texts[i]

def test_the_plain_loader_draws_frames_and_moves_the_pair_together(place):
    cfg = _bench_configs(place, aug_strength=0.)['live teacher']
    track = index_data(place/'plates').train[:1]
    still, moved = _PlainPairs(track, cfg), _PlainPairs(track, cfg.model_copy(update=dict(aug_strength=1.)))
    drawn = {still[0]['images'].sum().item() for _ in range(40)}
    assert 2 <= len(drawn) <= 5
    torch.manual_seed(0)
    seen = moved[0]
    torch.manual_seed(0)
    at = torch.randperm(5, generator=torch.default_generator)[:1].tolist()
    theta = draw_geometry(1, 1., torch.default_generator)
    lr, hr = (torch.from_numpy(fit(read_image(p[at[0]]), 32, 128))[None, None] for p in (track[0].lr, track[0].hr))
    assert torch.equal(seen['clean_hr'], to_input(warp(theta, hr)[0])[0]) and seen['clean_hr'].is_contiguous()
    assert torch.equal(seen['images'], apply_light(to_input(warp(theta, lr)[0]), *draw_light(1, 1., torch.default_generator))[0])

@pytest.mark.parametrize('workers', [0, 2])
def test_a_pass_has_as_many_batches_as_asked(place, workers):
    cfg = _bench_configs(place, batch_size=8)['CTC']
    data = open_data(cfg)
    loader = _plain_loader(cfg, data, 5, workers, pairs=False)
    for _ in range(2): assert [(b['images'].shape, len(b['texts'])) for b in loader] == [((8, 1, 3, 32, 128), 8)] * 5 # 40 of 24 tracks

def test_the_plain_step_is_ours_written_out(place):
    logits, texts = torch.randn(4, 16, 37, generator=torch.Generator().manual_seed(0)), ['ABC1234', 'AAB0C11', 'XYZ9Z99', 'BRA2E19']
    class Given(torch.nn.Linear):
        def forward_taps(self, x): return SimpleNamespace(logits=logits)
    cfgs = _bench_configs(place, batch_size=4, steps=3, aug_strength=0.)
    assert torch.allclose(_plain_loss(dict(images=logits, texts=texts), cfgs['CTC'], Given(1, 1)), ctc_loss(logits, texts, Charset()), atol=1e-5)
    cfg = cfgs['live teacher']
    data = open_data(cfg)
    ours = _trainer(cfg, data)
    student, teacher = new_student(cfg, data.split.hash), load_teacher(cfg, data.split.hash)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), ours.model.parameters()))
    batch = ours.batch(0)
    ours.model.train(), student.train()
    project = new_projections(cfg, student, teacher, cfg.distill_taps)
    with torch.no_grad(): a, b = ours.losses(batch)['loss'], _plain_loss(dict(images=batch.images, clean_hr=batch.clean_hr, texts=batch.texts), cfg, student, teacher, project)
    assert torch.allclose(a, b, rtol=1e-4)
    before = student.state_dict()['head.weight'].clone()
    assert len(list(_plain_steps(cfg, _plain_loader(cfg, data, 2), student, teacher))) == 3 and not torch.equal(before, student.state_dict()['head.weight'])
    assert not any(p.requires_grad for p in teacher.parameters())

def test_random_teacher_weights_belong_to_this_split_and_never_overwrite(place):
    cfg = _bench_configs(place, batch_size=4)['live teacher']
    data = open_data(cfg)
    _trainer(cfg, data)
    stamp = cfg.teacher_checkpoint.stat().st_mtime_ns
    _trainer(cfg, data)
    assert load_checkpoint(cfg.teacher_checkpoint)['split_hash'] == data.split.hash and cfg.teacher_checkpoint.stat().st_mtime_ns == stamp


def test_many_tracks_out_of_few(place, tmp_path, capsys):
    n = len(index_data(place/'plates').train)
    found = check(_multiply(place/'plates', tmp_path/'many', 2 * n + 3))
    assert len(found.index.train) == 2 * n + 3 and not found.faults and len({t.text for t in found.index.train}) == n
    a, b = found.index.train[0], index_data(place/'plates').train[0]
    assert any(p.samefile(q) for p in a.lr for t in index_data(place/'plates').train for q in t.lr) and a.scenario == b.scenario
    assert [p.name for p in tmp_path.iterdir()] == ['many']

def test_multiply_says_what_is_wrong(place, tmp_path):
    _multiply(place/'plates', tmp_path/'many', 2)
    with pytest.raises(KdocrError, match='many: .*must be new'): _multiply(place/'plates', tmp_path/'many', 2)
    (tmp_path/'test/track_00001').mkdir(parents=True)
    for i in range(1, 6): (tmp_path/f'test/track_00001/lr-00{i}.png').write_bytes(b'x')
    with pytest.raises(KdocrError, match='no training tracks'): _multiply(tmp_path/'test', tmp_path/'none', 2)

def test_rows_of_every_kind(place):
    got = _inputs(place, 2, 2, [0], 8, 'cpu') + _training(place, 2, 1, TRAINED, ['live teacher'], device='cpu', batch_size=8)
    assert all(r.keys() == FIELDS and math.isfinite(r['value']) and r['value'] > 0 for r in got)
    assert {r['arm'] for r in got} == {'packed', 'files, 0 workers', *TRAINED, 'live teacher, reference style'}
    assert {r['n'] for r in got if r['unit'] == 'images/s'} == {2 * 8 * 2} and {r['round'] for r in got} == {0, 1}

def test_a_measure_fails_in_one_line_and_memory_is_its_own():
    with pytest.raises(KdocrError, match='^bench, packing: /nowhere/plates: no such folder$'): _apart('packing', 1, place='/nowhere', rounds=1, workers=[1])
    ballast = torch.ones(100_000_000)
    assert _anonymous() > 400 and ballast.sum() > 0

def test_the_plan_compares_like_with_like(place):
    todo = _plan(place, TINY, 'cpu')
    assert {m for m, _, _ in todo} == {'packing', 'inputs', 'training', 'reading'}
    for m, threads, given in todo:
        if m == 'inputs': assert given['workers'] == ([0, 1] if threads == 1 else [threads])
        if m == 'training': assert given['workers'] == (0 if threads == 1 else threads)
    json.dumps(todo)


@pytest.mark.slow
def test_the_smallest_bench(tmp_path, capsys):
    found = json.loads(bench(tmp_path, device='cpu', sizes=TINY, fresh=False).read_text())
    assert all(r.keys() == FIELDS and r['value'] > 0 for r in found['records'])
    assert {'cpu', 'cores', 'load', 'load_after', 'torch', 'device'} <= found['machine'].keys() and found['sizes']['tracks'] == 30
    assert {'step of restran_tiny, 1 thread', 'step of restran_tiny on 5 frames, 1 thread'} <= {r['measure'] for r in found['ratios']}
    assert {'packed', 'CTC', 'live teacher'} <= {r['arm'] for r in found['ratios']} and all(r['lo'] <= r['median'] <= r['hi'] for r in found['summary'])
    assert all((tmp_path/f'bench.{k}').stat().st_size for k in ('png', 'pdf')) and {p.name for p in tmp_path.iterdir()} == {'bench.json', 'bench.png', 'bench.pdf', 'plates', 'runs'}
    out = capsys.readouterr().out
    assert 'packed / files, 0 workers' in out
    run_notebook('benchmark', tmp_path/'nb', dict(result=tmp_path/'bench.json', out=tmp_path/'nb'))
    assert (tmp_path/'nb/figures/bench.png').exists()

@pytest.mark.slow
def test_the_notebook_measures(tmp_path):
    run_notebook('benchmark', tmp_path, dict(batch_size=4, rounds=2, steps=1, out=tmp_path))
    found = json.loads((tmp_path/'bench.json').read_text())
    assert found['ratios'] and found['machine']['platform'] and {r['rounds'] for r in found['ratios']} == {2} and (tmp_path/'figures/bench.pdf').exists()
