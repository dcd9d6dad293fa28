"""The command: the seed's two lines, a teacher that is a guest, and faults in one clear line."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdocr.config import CONFIGS, Config, load_config
from kdocr.core import KdocrError, read_json
from kdocr.data.batches import open_data
from kdocr.training.distillation import TrainerDistill
from kdocr.training.networks import load_teacher, new_model, new_student
from kdocr.training.run_folder import RunFolder, load_checkpoint, load_model, save_checkpoint, state_hash
from kdocr.training.trainer import Trainer
from kdocr.training.train_kd import new_trainer, train_kd
from kdocr.training.command import train_command, parse
from small_runs import SMALL, drawn, flags, same, small

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope='module')
def teacher_run(tmp_path_factory): return train_kd(small(tmp_path_factory.mktemp('teacher'), name='hr'))


@pytest.fixture
def student_cfg(teacher_run, tmp_path): return small(tmp_path, name='lr', mode='student', teacher_checkpoint=str(teacher_run.published))


def test_the_best_teacher_is_published(teacher_run):
    assert teacher_run.published.read_bytes() == teacher_run.best.read_bytes()


def test_the_teacher_is_bit_identical_and_the_student_moved(student_cfg):
    cfg, data = student_cfg, open_data(student_cfg)
    teacher, student = load_teacher(cfg, data.split.hash), new_student(cfg, data.split.hash)
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    start = {k: v.clone() for k, v in student.state_dict().items()}
    class Careless(TrainerDistill):
        def losses(self, batch):
            self.model.train()
            return super().losses(batch)
    t = Careless(cfg, RunFolder(cfg.out/cfg.name), data, student, teacher)
    t.fit()
    assert same(state, t.teacher.state_dict()) and t.teacher is teacher and not teacher.training
    assert same(state, load_checkpoint(cfg.teacher_checkpoint)['model'])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    still = [k for k, v in student.state_dict().items() if torch.equal(v, start[k])]
    assert all(k.startswith('fusion') for k in still), still # one frame: there is nothing to weigh, so the vote learns nothing
    assert not {id(m) for m in teacher.modules()} & {id(m) for m in student.modules()}
    saved = load_checkpoint(t.run.last)
    assert {k for k, v in saved.items() if isinstance(v, dict) and v} == {'model', 'optimizer', 'balance'} and set(saved['model']) == set(start)


def test_a_student_run_logs_every_term_and_its_teacher(student_cfg, teacher_run):
    run = train_kd(student_cfg)
    first, row = run.log.rows()[:2]
    taps = ('backbone_out', 'transformer_out', 'logits')
    assert set(first) - set(row) == {'ctc_grad', *(f'kd_{t}_{x}' for t in taps for x in ('grad', 'grad_cos'))} # measured every grad_log_every steps
    assert row['kd_logits_share'] == pytest.approx(row['kd_logits_weighted']/row['loss'])
    parts = ('', '_weighted', '_share')
    assert {f'kd_{t}{p}' for t in taps for p in parts} | {'ctc', 'loss', 'grad_norm', 'lr', 'step', 'epoch', 'seconds'} == set(row)
    assert row['loss'] == pytest.approx(row['ctc'] + sum(row[f'kd_{t}_weighted'] for t in taps), rel=1e-5)
    env = read_json(run.env)
    assert env['teacher_hash'] == state_hash(load_model(teacher_run.published))
    assert env['split_hash'] == load_checkpoint(run.best)['split_hash'] == read_json(teacher_run.env)['split_hash']
    scores = read_json(run.scores)
    assert scores['test']['n'] == SMALL['synth_test'] == len(run.predictions('test')) and scores['val']['n'] == len(run.predictions('val'))


def test_a_weight_scales_its_terms(student_cfg):
    run = train_kd(student_cfg.model_copy(update=dict(distill_weight=.25, distill_taps=('logits',), steps=2)))
    for r in run.log.rows()[:2]:
        assert r['kd_logits_weighted'] == pytest.approx(r['kd_logits'] / 4) and r['loss'] == pytest.approx(r['ctc'] + r['kd_logits'] / 4, rel=1e-5)


def test_the_control_differs_in_the_loss_alone(student_cfg, teacher_run):
    cfg, data = student_cfg, open_data(student_cfg)
    control = cfg.model_copy(update=dict(distill_weight=0., teacher_checkpoint=None))
    a = new_trainer(cfg, RunFolder(cfg.out/'a'), data, load_teacher(cfg, data.split.hash))
    b = new_trainer(control, RunFolder(cfg.out/'b'), data, None)
    assert type(b) is Trainer and same(a.model.state_dict(), b.model.state_dict()) and a.batch(3).keys == b.batch(3).keys
    assert torch.equal(a.batch(3).images, b.batch(3).images)
    assert next(a.steps())['ctc'] == next(b.steps())['ctc']


def test_where_a_student_starts(student_cfg, teacher_run):
    split = open_data(student_cfg).split.hash
    def start(**values): return state_hash(new_student(student_cfg.model_copy(update=values), split))
    assert start() == start(distill_weight=0.) != start(seed=1)
    assert start() != state_hash(new_model(load_config(), 'restran_tiny')) # no twin of the teacher's own start
    assert start(student_init='teacher') == start(student_init=str(teacher_run.best)) == state_hash(load_model(teacher_run.best))


def test_without_clean_hr_the_teacher_sees_the_students_view(student_cfg):
    cfg = student_cfg.model_copy(update=dict(clean_hr_guided=False, student_init='teacher'))
    t = new_trainer(cfg, RunFolder(cfg.out/'own'), open_data(cfg), load_teacher(cfg, open_data(cfg).split.hash))
    batch, seen = t.batch(0), []
    assert batch.clean_hr is None
    ask = t.frozen.forward_taps
    t.frozen.forward_taps = lambda images: seen.append(images) or ask(images)
    t.losses(batch)
    assert len(seen) == 1 and seen[0] is batch.images


def test_a_finished_run_is_reported_not_trained(teacher_run, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, 'fit', lambda self: pytest.fail('trained again'))
    before = {p: p.read_bytes() for p in teacher_run.path.rglob('*') if p.is_file() and p.name != 'env.json'}
    assert train_command([*flags(**SMALL, data=drawn(), out=teacher_run.path.parent, name='hr')]) == 0
    assert f'{teacher_run.path}: val (HR)' in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in before}


@pytest.fixture
def fails(capsys):
    "Run the command, expect exit status 2 and one line that says each of `words`."
    def run(argv, *words):
        assert train_command([str(a) for a in argv]) == 2
        err = capsys.readouterr().err.strip().split('\n')[-1]
        for w in words: assert w in err
        assert 'Traceback' not in err
    return run


def student_flags(tmp_path, **values): return flags(**{**SMALL, 'mode': 'student', 'out': tmp_path, 'data': drawn(), 'name': 'lr', **values})


def test_teacher_checkpoints_that_do_not_fit(teacher_run, tmp_path, fails):
    good = teacher_run.published
    ckpt = load_checkpoint(good)
    fails(student_flags(tmp_path), 'teacher_checkpoint')
    fails(student_flags(tmp_path, teacher_checkpoint=tmp_path/'none.pth'), 'none.pth: no such checkpoint')
    (tmp_path/'cut.pth').write_bytes(good.read_bytes()[:20_000])
    fails(student_flags(tmp_path, teacher_checkpoint=tmp_path/'cut.pth'), 'cut.pth: damaged')
    fails(student_flags(tmp_path, teacher_checkpoint=good, model_type='restran'), str(good), "model_type is 'restran_tiny', needed is 'restran'")
    untold = {k: v for k, v in ckpt.items() if k != 'train_plate_ids'} # what it was trained on is not known
    for key, value in dict(charset='ABC', split_hash='another', height=48).items():
        save_checkpoint(tmp_path/f'{key}.pth', {**untold, key: value})
        fails(student_flags(tmp_path, teacher_checkpoint=tmp_path/f'{key}.pth'), f'{key}.pth: {key} is {value!r}')
    assert not (tmp_path/'lr').exists() # refused before anything was written


def test_a_teacher_that_was_exchanged_is_noticed(student_cfg, teacher_run, tmp_path):
    train_kd(student_cfg)
    ckpt = load_checkpoint(teacher_run.published)
    moved = save_checkpoint(tmp_path/'moved.pth', ckpt)
    train_kd(student_cfg.model_copy(update=dict(teacher_checkpoint=moved))) # the same weights under another name
    ckpt['model'] = {k: v + 1 for k, v in ckpt['model'].items()}
    save_checkpoint(moved, ckpt)
    with pytest.raises(KdocrError, match='teacher_hash is'): train_kd(student_cfg.model_copy(update=dict(teacher_checkpoint=moved)))


def test_keys_and_flags_by_name(tmp_path, fails):
    fails(['--batchsize', '8'], '--batchsize. Did you mean --batch-size?')
    fails(['--teacher-chkpt', 'x'], 'Did you mean --teacher-ckpt?')
    fails(['--lr', 'fast'], 'lr: Input should be a valid number', "'fast'")
    (tmp_path/'my.yaml').write_text('distil_weight: 2\n')
    fails(['--config', tmp_path/'my.yaml'], 'my.yaml', "'distil_weight'", "did you mean 'distill_weight'?")
    fails(['--config', 'configs/icpr_hd.yaml'], 'icpr_hd', "did you mean 'icpr_hr'?")
    fails(flags(model_type='restran_tinny', **SMALL, data=drawn(), out=tmp_path), "did you mean 'restran_tiny'?")
    fails(flags(device='gpu', **SMALL, data=drawn(), out=tmp_path), "device 'gpu'")


def test_every_field_is_a_flag_both_ways():
    cfg = Config(mode='student', teacher_checkpoint='t.pth', distill_taps=('logits',), clean_hr_guided=False, steps=5, data='d')
    words = [w for k, v in cfg for w in (f'--{k.replace("_", "-")}', ','.join(v) if isinstance(v, tuple) else str(v))]
    assert parse(words) == cfg == parse([w.replace('-', '_').replace('__', '--') if w.startswith('--') else w for w in words])
    assert parse('--mode student --teacher-ckpt t.pth'.split()).teacher_checkpoint == Path('t.pth')
    assert parse('--config icpr_hr --seed 3 --steps none'.split()) == load_config('icpr_hr', seed=3, steps=None)


def test_shipped_configs_are_whole():
    assert {p.stem for p in CONFIGS.glob('*.yaml')} >= {'icpr_hr', 'icpr_distill'}
    hr, lr = load_config('icpr_hr'), load_config('configs/icpr_distill.yaml')
    assert (hr.mode, lr.mode) == ('teacher', 'student') and lr.teacher_checkpoint == hr.out/f'{hr.name}_best.pth'
    text = (CONFIGS/'icpr_distill.yaml').read_text()
    assert all(f'{k}:' in text for k in ('teacher_checkpoint', 'distill_weight', 'model_type', 'student_model_type', 'clean_hr_guided'))


@pytest.mark.slow
def test_the_seeds_two_lines(tmp_path):
    "As the seed's report writes them, from a checkout; only made small by flags."
    tiny = flags(**SMALL)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    def line(words, *more): return subprocess.run([sys.executable, *words.split(), *tiny, *more], cwd=tmp_path, env=env, capture_output=True, text=True)
    (tmp_path/'train_kd.py').write_bytes((ROOT/'train_kd.py').read_bytes())
    for words in ('train_kd.py --mode teacher --config configs/icpr_hr.yaml',
                  'train_kd.py --mode student --config configs/icpr_distill.yaml --teacher-ckpt results/restran_hr_teacher_best.pth',
                  '-m kdocr.training.command --mode student --config icpr_distill --student-init teacher --name from_teacher'):
        done = line(words)
        assert done.returncode == 0, done.stderr
    assert 'results/from_teacher: val (LR)' in done.stdout
    assert {p.name for p in (tmp_path/'results').iterdir()} >= {'restran_hr_teacher', 'restran_hr_teacher_best.pth', 'restran_lr_student', 'from_teacher'}


@pytest.mark.parametrize('how', [dict(aug_strength=0.), dict(aug_strength=.5, n_fixed_augs=2), dict(aug_strength=.5, n_fixed_augs=2, frames=5)])
def test_cached_and_live_training_have_the_same_losses_to_the_stored_precision(student_cfg, how):
    def losses(**values):
        cfg = student_cfg.model_copy(update=dict(how, **values))
        data = open_data(cfg)
        teacher = new_model(cfg, cfg.model_type).eval() if cfg.frames > 1 else load_teacher(cfg, data.split.hash)
        t = TrainerDistill(cfg, RunFolder(cfg.out/'x'), data, new_student(cfg, data.split.hash), teacher)
        assert (t.cache is None) == (cfg.teacher_cache == 'off') == t.needs_clean
        return [{k: float(v) for k, v in r.items()} for r in t.steps()]
    live, cached = losses(teacher_cache='off'), losses()
    for a, b in zip(live[:1], cached[:1]): assert b == pytest.approx(a, rel=2**-10)
    for a, b in zip(live, cached): assert b['loss'] == pytest.approx(a['loss'], rel=.01), 'rounding grows with the steps'
    assert cached == losses(), 'and from the files, the same again'


def test_a_cache_that_cannot_be_exact_is_refused_with_the_reason(student_cfg):
    for how, why in ((dict(), 'n_fixed_augs'), (dict(aug_strength=0., recombine_p=.5), 'recombine_p'), (dict(aug_strength=0., clean_hr_guided=False), "student's own view")):
        cfg = student_cfg.model_copy(update=dict(teacher_cache='on', **how))
        with pytest.raises(KdocrError, match=f'teacher_cache: on, but .*{why}'): train_kd(cfg)


def test_a_lost_published_teacher_comes_back_and_another_run_publishes_nothing(tmp_path):
    run = train_kd(small(tmp_path, name='hr'))
    whole = run.published.read_bytes()
    run.published.unlink()
    with pytest.raises(KdocrError, match='holds another run: lr is'): train_kd(small(tmp_path, name='hr', lr=1e-4))
    assert not run.published.exists()
    train_kd(small(tmp_path, name='hr'))
    assert run.published.read_bytes() == whole
