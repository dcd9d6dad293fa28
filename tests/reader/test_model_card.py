"""The card of a run: every figure counted from its folder."""
import json

import pytest
import yaml

from kdocr.cli import main
from kdocr.core import KdocrError, read_json, write_json
from kdocr.metrics import Prediction, wilson, write_predictions
from kdocr.reader.model_card import card_text, model_card, write_model_card
from kdocr.training.train_kd import train_kd
from small_runs import drawn, small


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return train_kd(small(tmp_path_factory.mktemp('card'), name='mine', steps=3, lr=.002)).path


def test_figures_are_the_runs_own(run):
    c, scores = model_card(run), read_json(run/'scores.json')
    for part in ('val', 'test'):
        a, s = c['accuracy'][part], scores[part]
        assert {k: a[k] for k in ('n', 'right', 'exact_match', 'exact_match_interval', 'cer', 'confidence_gap')} == {k: s[k] for k in ('n', 'right', 'exact_match', 'exact_match_interval', 'cer', 'confidence_gap')}
        assert {h: (v['n'], v['right']) for h, v in a['by_height'].items()} == {h: (v['n'], v['right']) for h, v in s['by_height'].items()}
        assert all(v['interval'] == list(wilson(v['right'], v['n'])) for v in a['by_height'].values()) and sum(v['n'] for v in a['by_height'].values()) == s['n']
    assert c['model']['parameters'] == 310_642 and (c['model']['steps'], c['model']['width'], c['model']['frames']) == (16, 128, 1)
    assert c['recipe']['lr'] == .002 and c['recipe']['steps'] == 3 and 'student_init' not in c['recipe'] and 'log_every' not in c['recipe']
    assert c['data']['drawn'] and 'tracks 40, test 6' in c['data']['source'] and c['data']['fingerprint'] == read_json(run/'env.json')['data_fingerprint']
    assert any('drawn plates alone' in x for x in c['limits']) and any('Fewer than 30' in x for x in c['limits'])
    json.dumps(c, allow_nan=False)


def test_other_predictions_stand_beside(run, tmp_path, capsys):
    preds = [Prediction(f'{i}.jpg', 'ABC1234', 'ABC1234' if i < 10 else 'ABC1235', .9, 'Brazilian', '', 13 if i >= 20 else 40) for i in range(60)]
    write_predictions(tmp_path/'p.csv', preds)
    assert main(['export', str(run), '--card', '--out', str(tmp_path/'out'), '--also', 'photographs, night', str(tmp_path/'p.csv')]) == 0
    assert capsys.readouterr().out.strip() == f'{tmp_path}/out/card.md'
    c, text = read_json(tmp_path/'out'/'card.json'), (tmp_path/'out'/'card.md').read_text()
    a = c['accuracy']['photographs, night']
    assert a['exact_match'] == 10/60 and a['by_height']['12-14'] == dict(n=40, right=0, exact_match=0., interval=list(wilson(0, 40))) and a['calibration_error'] == pytest.approx(.9 - 1/6)
    assert '| photographs, night | 60 | 16.7' in text and '| photographs, night | 12-14 px | 40 | 0.0 (0.0 to 8.8) |' in text and card_text(c) == text
    assert any(x.startswith('Fewer than half of the texts are read rightly: ') and 'photographs, night, at 12-14 px' in x for x in c['limits'])
    assert any(x.startswith('Fewer than 30 pictures') and 'photographs, night, at 36+ px' in x for x in c['limits'])


def test_data_that_nobody_drew(run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path/'mine')
    config = yaml.safe_load((tmp_path/'mine'/'config.yaml').read_text())
    (tmp_path/'mine'/'config.yaml').write_text(yaml.safe_dump(config | dict(data=str(tmp_path/'LRLPR-26'))))
    write_json(tmp_path/'mine'/'env.json', read_json(tmp_path/'mine'/'env.json') | dict(data=str(tmp_path/'LRLPR-26')))
    c = model_card(tmp_path/'mine')
    assert c['data']['drawn'] is None and any('is not known' in x for x in c['limits']) and not any('drawn plates alone' in x for x in c['limits'])
    (tmp_path/'LRLPR-26').mkdir()
    c = model_card(tmp_path/'mine')
    assert 'synth_tracks' not in c['recipe'] and c['data']['source'] == 'tracks, LRLPR-26' and c['data']['drawn'] is False and not any('drawn' in x for x in c['limits'])


def test_no_empty_table_and_no_part_that_is_not_there(run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path/'mine')
    write_json(tmp_path/'mine'/'scores.json', {k: v for k, v in read_json(run/'scores.json').items() if k != 'test'})
    c = model_card(tmp_path/'mine')
    assert c['reading'].startswith('val: ') and 'test' not in c['reading']
    alike = c | dict(accuracy={k: a | dict(by_height=dict([*a['by_height'].items()][:1]), by_layout=dict([*a['by_layout'].items()][:1])) for k, a in c['accuracy'].items()})
    assert 'By height and layout' in card_text(c) and 'By height and layout' not in card_text(alike)


def test_what_has_no_card(run, tmp_path):
    with pytest.raises(KdocrError, match='no run folder'): model_card(drawn())
    (tmp_path/'config.yaml').write_text('name: x\n')
    with pytest.raises(KdocrError, match='not finished; only a finished run has a card'): model_card(tmp_path)
    with pytest.raises(KdocrError, match='nowhere.csv: no such file'): write_model_card(run, tmp_path, {'x': tmp_path/'nowhere.csv'})
    (tmp_path/'file').touch()
    with pytest.raises(KdocrError, match='could not be written'): write_model_card(run, tmp_path/'file')
