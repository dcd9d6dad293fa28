"""One ONNX file: open in batch and frames, said to be the same reader only where it is."""
import json
import shutil

import numpy as np
import pytest
import torch

onnx = pytest.importorskip('onnx', reason='onnx is not installed')
pytest.importorskip('onnxscript', reason='onnxscript is not installed')

from kdocr.reader import export as module
from kdocr.charset import Charset
from kdocr.cli import main
from kdocr.config import Config
from kdocr.core import KdocrError
from kdocr.reader.recogniser import about_network, session
from kdocr.reader.export import _Comparison, _compare_graph, export, _to_half_weights, _to_onnx
from kdocr.models.restran import make_model
from kdocr.training.run_folder import RunFolder, describe, save_checkpoint
from small_runs import drawn

CHARS = 'aé-ñ'


def checkpoint(path, model_type='restran_tiny', seed=0, **values):
    torch.manual_seed(seed)
    cfg = Config(**values)
    model = make_model(model_type, len(Charset(cfg.charset)))
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * .05) # BatchNorms and the STN's last layer at other than their start
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(std=.2); m.running_var.uniform_(.5, 1.5)
    return save_checkpoint(path, dict(describe(cfg, model_type, 'none'), model=model.state_dict(), step=0)), model.eval()


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A checkpoint, its model and its graph, made once."
    path, model = checkpoint(tmp_path_factory.mktemp('export')/'tiny.pth')
    return path, model, _to_onnx(model, 1, 32, 128)


def apart(model, raw, *shape):
    x = torch.rand(*shape, 3, 32, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad(): ours = model.forward_taps(x).logits
    theirs = session(raw).run(['logits'], {'images': x.numpy()})[0]
    assert theirs.shape == tuple(ours.shape) and theirs.dtype == np.float32
    return float((ours.softmax(-1) - torch.from_numpy(theirs).softmax(-1)).abs().max())


@pytest.mark.parametrize('b, f', [(1, 1), (2, 5), (7, 1), (3, 2), (1, 4)])
def test_batch_and_frames_are_open(tiny, b, f):
    _, model, graph = tiny
    assert apart(model, graph.SerializeToString(), b, f) < 1e-5


def test_what_the_file_says_of_itself(tiny):
    _, _, graph = tiny
    (x,), (y,) = graph.graph.input, graph.graph.output
    dims = lambda v: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
    assert (x.name, dims(x), y.name, dims(y)) == ('images', ['b', 'f', 3, 32, 128], 'logits', ['b', 16, 37])
    raw = graph.SerializeToString()
    assert b'kdocr/' not in raw and b'site-packages' not in raw # where it was made is nobody's business
    assert len(raw) < 3e6 and not any(n.op_type == 'BatchNormalization' for n in graph.graph.node)


def test_metadata_of_what_was_calibrated_and_what_was_not(tiny):
    ckpt = dict(charset='abc', height=32, width=96, frames=5, model_type='restran_tiny')
    assert about_network(ckpt) == dict(ckpt, temperature=1., layouts=[])
    assert about_network(dict(ckpt, charset=Charset().chars))['layouts'] == ['Brazilian', 'Mercosur']
    assert about_network(dict(ckpt, temperature=1.4, layouts=['Brazilian']))['temperature'] == 1.4


@pytest.mark.slow
@pytest.mark.parametrize('name', ['restran_stn', 'restran_31m'])
def test_the_large_ones_too(name):
    torch.manual_seed(0)
    model = make_model(name, 37).eval()
    with torch.no_grad(): model.stn.locate[-1].weight.normal_(std=.01)
    raw = _to_onnx(model, 5, 32, 128).SerializeToString()
    assert apart(model, raw, 1, 1) < 1e-4 and apart(model, raw, 3, 5) < 1e-4


def test_export_with_the_data_of_its_run(tiny, tmp_path, capsys):
    path, model, _ = tiny
    run = tmp_path/'results'/'mine'
    (run/'checkpoints').mkdir(parents=True)
    (run/'config.yaml').write_text(f'data: {drawn()}\nval_frac: 0.2\nname: mine\nout: {tmp_path}/results\n')
    ckpt = (run/'checkpoints'/'best.pth'); ckpt.write_bytes(path.read_bytes())
    assert RunFolder.of(ckpt) == RunFolder(run) and RunFolder.of(path) is None
    assert main(['export', str(ckpt)]) == 0
    out = capsys.readouterr().out
    assert f'{run}/checkpoints/best.onnx' in out and f'the validation split of {drawn()}' in out and 'strings the same' in out and '1 and 5 frames' in out
    told = json.loads(session(ckpt.with_suffix('.onnx')).get_modelmeta().custom_metadata_map['kdocr'])
    assert (told['charset'], told['height'], told['width'], told['frames'], told['model_type']) == (Charset().chars, 32, 128, 1, 'restran_tiny')


def test_another_charset_several_frames_and_half(tmp_path, capsys):
    path, model = checkpoint(tmp_path/'words.pth', charset=CHARS, frames=3, width=96)
    assert main(['export', str(path), '--out', str(tmp_path/'half.onnx'), '--half', '--data', drawn()]) == 0
    assert '1 and 3 frames' in capsys.readouterr().out
    s = session(tmp_path/'half.onnx')
    told = json.loads(s.get_modelmeta().custom_metadata_map['kdocr'])
    assert (told['charset'], told['frames'], told['width'], told['layouts']) == (CHARS, 3, 96, [])
    assert s.run(None, {'images': np.zeros((2, 4, 3, 32, 96), np.float32)})[0].shape == (2, 12, 5)
    assert (tmp_path/'half.onnx').stat().st_size < .75e6


def test_16_bits_may_turn_a_near_tie_and_say_so(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, '_compare_graph', lambda *a: _Comparison(10, 9, 5e-5, (1,)))
    def asked(*more): return main(['export', str(tiny[0]), '--out', str(tmp_path/'o.onnx'), '--data', drawn(), *more])
    assert asked() == 2 and 'asked are all strings' in capsys.readouterr().err and not (tmp_path/'o.onnx').exists()
    assert asked('--half') == 0 and '9 of 10 strings the same' in capsys.readouterr().out and (tmp_path/'o.onnx').exists()


def test_a_run_folder_stands_for_its_best_checkpoint(tiny, tmp_path, capsys):
    (tmp_path/'run'/'checkpoints').mkdir(parents=True)
    shutil.copy(tiny[0], tmp_path/'run'/'checkpoints'/'best.pth')
    assert main(['export', str(tmp_path/'run'), '--data', drawn()]) == 0 and (tmp_path/'run'/'checkpoints'/'best.onnx').exists()
    assert main(['export', str(tmp_path)]) == 2 and 'a folder without checkpoints/best.pth' in capsys.readouterr().err


@pytest.mark.parametrize('args, said', [(['FILE', '--out', 'HERE'], 'HERE: a folder, where a file is to be written'), (['FILE', '--out', 'FILE'], 'tiny.pth: what is written is an .onnx'),
                                        (['HERE/x.onnx'], 'HERE/x.onnx: an ONNX file already; export takes a checkpoint (.pth)'), (['HERE/nowhere'], 'HERE/nowhere: no such checkpoint')])
def test_what_is_refused_before_anything_is_compared(args, said, tiny, tmp_path, capsys):
    (tmp_path/'x.onnx').touch()
    before = tiny[0].read_bytes()
    assert main(['export', *(a.replace('FILE', str(tiny[0])).replace('HERE', str(tmp_path)) for a in args)]) == 2
    out, err = capsys.readouterr()
    assert out == '' and said.replace('HERE', str(tmp_path)) in err and err.count('\n') == 1 and tiny[0].read_bytes() == before


def test_half_keeps_what_16_bits_cannot_hold(tiny):
    graph = onnx.ModelProto(); graph.CopyFrom(tiny[2])
    big = max(graph.graph.initializer, key=lambda w: len(w.raw_data))
    x = onnx.numpy_helper.to_array(big).copy(); x.flat[0] = 1e6
    big.CopyFrom(onnx.numpy_helper.from_array(x, big.name))
    kept = next(w for w in _to_half_weights(graph).graph.initializer if w.name == big.name)
    assert kept.data_type == onnx.TensorProto.FLOAT and float(onnx.numpy_helper.to_array(kept).flat[0]) == 1e6
    assert any(w.data_type == onnx.TensorProto.FLOAT16 for w in graph.graph.initializer)


def test_a_file_that_reads_otherwise_is_not_written(tiny, tmp_path, monkeypatch, capsys):
    path, _, graph = tiny
    wrong = onnx.ModelProto(); wrong.CopyFrom(graph)
    head = next(w for w in wrong.graph.initializer if list(w.dims) == [37])
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) + np.linspace(-3, 3, 37, dtype=np.float32), head.name))
    monkeypatch.setattr(module, '_to_onnx', lambda *a: wrong)
    (tmp_path/'x.onnx').write_text('before')
    assert main(['export', str(path), '--out', str(tmp_path/'x.onnx'), '--data', drawn()]) == 2
    assert 'not written, it does not read as' in capsys.readouterr().err
    assert (tmp_path/'x.onnx').read_text() == 'before' and [p.name for p in tmp_path.iterdir()] == ['x.onnx']


def test_a_comparison_sees_one_character(tiny):
    path, model, graph = tiny
    x = torch.rand(4, 1, 3, 32, 128, generator=torch.Generator().manual_seed(2)) * 2 - 1
    same = _compare_graph(model, graph.SerializeToString(), Charset(), [x])
    assert (same.readings, same.same) == (4, 4) and same.apart < 1e-5
    other = make_model('restran_tiny', 37).eval()
    assert _compare_graph(other, graph.SerializeToString(), Charset(), [x]).apart > 1e-3


@pytest.mark.parametrize('raw', [b'', b'something else', b'PK\x03\x04 no zip'])
def test_what_is_no_checkpoint(tmp_path, raw, capsys):
    (tmp_path/'x.pth').write_bytes(raw)
    assert main(['export', str(tmp_path/'x.pth')]) == 2
    assert f'{tmp_path}/x.pth: damaged, or no checkpoint' in capsys.readouterr().err


def test_pickled_code_is_never_run(tmp_path, capsys):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    torch.save(dict(format=1, model=Bomb()), tmp_path/'x.pth')
    assert main(['export', str(tmp_path/'x.pth')]) == 2
    assert not (tmp_path/'ran').exists()


def test_other_weights_and_absent_files(tiny, tmp_path, capsys):
    torch.save({'model': {}}, tmp_path/'x.pth')
    for name, said in (('x.pth', 'no schema_version, needed is 2'), ('nowhere.pth', 'no such checkpoint')):
        assert main(['export', str(tmp_path/name)]) == 2
        assert said in capsys.readouterr().err
    assert main(['export', str(tiny[0]), '--out', str(tmp_path/'o.onnx'), '--data', str(tmp_path/'nowhere')]) == 2
    assert 'nowhere: no such folder' in capsys.readouterr().err


def test_not_installed(tiny, monkeypatch):
    import builtins
    real = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name, name=name)) if name == 'onnxscript' else real(name, *a, **k))
    with pytest.raises(KdocrError, match=r"export needs onnxscript: pip install 'kdocr\[export\]'"): _to_onnx(tiny[1], 1, 32, 128)
