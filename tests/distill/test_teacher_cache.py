"The teacher's taps on disk: what is taken is what was said, whole or not at all, computed once, and never loaded as a whole."
import json, os, signal, subprocess, sys, threading
from collections import namedtuple
from pathlib import Path
import numpy as np
import pytest, torch
from kdocr.distill import teacher_cache as tapcache
from kdocr.core import KdocrError
from kdocr.distill.teacher_cache import _taps_dict, _spot_checks, tap_cache
from kdocr.models.taps import TapOut

N, V, T, WIDTHS = 11, 3, 4, {'logits': 5, 'backbone_out': 7, 'transformer_out': 6}
KEY = dict(teacher='0123456789abcdef', preprocessing=dict(height=32, width=128), images=['track_1', 'track_2'], views=[[0, 1, 2], 0.5])
ROWS, VIEWS = torch.arange(N).repeat_interleave(V), torch.arange(V).repeat(N)

class Teacher:
    "A linear model of (row, view) with fixed weights, that counts what it is asked."
    def __init__(self, seed=0):
        g, self.asked = torch.Generator().manual_seed(seed), []
        self.weights = {k: torch.randn(N*V, T*d, generator=g) for k, d in WIDTHS.items()}

    def __call__(self, rows, views):
        self.asked.append(len(rows))
        out = {k: w[rows*V + views].unflatten(1, (T, -1)) for k, w in self.weights.items()} # its picture is the view's number, one-hot
        return TapOut(out.pop('logits'), out)

PROBE = len(_spot_checks(N, V)[0])

def make(folder, teacher, key=KEY, **kw): return tap_cache(folder, key, N, V, teacher, batch=8, **kw)

def places(folder): return sorted(p.name for p in folder.iterdir() if p.is_dir())

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ---- what is taken

def test_cached_is_live_to_half_precision(tmp_path):
    teacher = Teacher()
    cache, live = make(tmp_path, teacher), _taps_dict(teacher(ROWS, VIEWS))
    g = torch.Generator().manual_seed(0)
    for i in (torch.arange(N*V), torch.randint(N*V, (50,), generator=g), torch.tensor([], dtype=torch.long)): # all, some of them twice, none
        kept = _taps_dict(cache.take(ROWS[i], VIEWS[i]))
        assert list(kept) == cache.names == list(WIDTHS)
        for k, x in kept.items():
            a = live[k][i]
            assert x.dtype == torch.float32 and x.shape == (len(i), T, WIDTHS[k])
            assert ((x - a).abs() <= a.abs()*2**-11 + 2**-25).all() and torch.equal(x, a.half().float())
    assert (kept['logits'].numel(), cache.nbytes) == (0, 2*N*V*T*sum(WIDTHS.values()))

@pytest.mark.parametrize('value', [0., -0., 2**-24, 6e-8, 6.1e-5, 1/3, -2049., 65504., 65519.])
def test_rounding_of_a_single_value(tmp_path, value):
    def say(rows, views): return TapOut(torch.full((len(rows), 1, 1), value), {'big': torch.full((len(rows), 1, 1), 1.)})
    got = tap_cache(tmp_path, {}, 1, 1, say).take(torch.tensor([0]), torch.tensor([0])).logits.item()
    assert abs(got - value) <= 2**-11*abs(value) + 2**-25

def test_reopening_gives_the_same_bits_for_four_views(tmp_path):
    first, teacher = _taps_dict(make(tmp_path, Teacher()).take(ROWS, VIEWS)), Teacher()
    again = make(tmp_path, teacher, dict(reversed(KEY.items())) | dict(views=((0, 1, 2), 0.5))) # neither order nor tuple matters
    assert teacher.asked == [PROBE] == [4] and same(_taps_dict(again.take(ROWS, VIEWS)), first)

def test_a_process_cannot_change_the_file(tmp_path):
    cache = make(tmp_path, Teacher())
    before = _taps_dict(cache.take(ROWS, VIEWS))
    cache.take(ROWS, VIEWS).logits.zero_()
    assert same(_taps_dict(cache.take(ROWS, VIEWS)), before)
    for x in cache.arrays.values(): x.zero_() # its own private pages
    assert same(_taps_dict(make(tmp_path, Teacher()).take(ROWS, VIEWS)), before)

@pytest.mark.parametrize('row, view, says', [(N, 0, f'row 0..{N} of {N}'), (-1, 0, 'row -1..0'), (0, V, f'view 0..{V} of {V}'), (0, -1, 'view -1..0')])
def test_no_neighbour_for_a_row_or_view_that_does_not_exist(tmp_path, row, view, says):
    with pytest.raises(IndexError, match=says): make(tmp_path, Teacher()).take(torch.tensor([0, row]), torch.tensor([0, view]))

def test_bf16_taps_are_kept_exactly(tmp_path):
    teacher = Teacher()
    def rough(rows, views): return TapOut(*(o.bfloat16() if torch.is_tensor(o) else {k: x.bfloat16() for k, x in o.items()} for o in teacher(rows, views)))
    kept, live = _taps_dict(make(tmp_path, rough).take(ROWS, VIEWS)), _taps_dict(rough(ROWS, VIEWS))
    for k, x in live.items(): assert x.dtype == torch.bfloat16 and torch.equal(kept[k][x.abs() > 1e-5], x.float()[x.abs() > 1e-5])

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('free', [0, 1 << 30]) # nothing fits: pinned; all fits: resident
def test_on_a_gpu(tmp_path, monkeypatch, free):
    cpu = make(tmp_path, Teacher())
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device=None: (free, 1 << 30))
    gpu = make(tmp_path, Teacher(), device='cuda')
    assert gpu.resident == bool(free)
    for _ in range(20): # pinned buffers come round again
        i = torch.randint(N*V, (50,))
        got = _taps_dict(gpu.take(ROWS[i], VIEWS[i]))
        assert all(x.is_cuda for x in got.values()) and same({k: x.cpu() for k, x in got.items()}, _taps_dict(cpu.take(ROWS[i], VIEWS[i])))

# ---- the key

def test_another_key_is_another_folder_and_the_old_one_stays(tmp_path):
    make(tmp_path, Teacher())
    for changed in (dict(teacher='f'*16), dict(preprocessing=dict(height=32, width=96)), dict(images=['track_1', 'track_3']), dict(views=[[0, 1, 2], 1.])):
        other, before = Teacher(seed=1), places(tmp_path)
        got = make(tmp_path, other, KEY | changed)
        assert sum(other.asked) == PROBE + N*V and set(before) < set(places(tmp_path))
        assert torch.equal(got.take(ROWS, VIEWS).logits, other(ROWS, VIEWS).logits.half().float())
    fewer = Teacher()
    tap_cache(tmp_path, KEY, N - 1, V, fewer)
    assert sum(fewer.asked) == PROBE + (N - 1)*V and len(places(tmp_path)) == 6
    assert make(tmp_path, Teacher()).take(ROWS, VIEWS)

@pytest.mark.parametrize('value', [Path('teacher.pth'), np.float32(1), float('nan'), {1, 2}])
def test_a_key_of_plain_values(tmp_path, value):
    with pytest.raises(KdocrError, match="teacher taps: the cache's key takes plain values only"): make(tmp_path, Teacher(), KEY | dict(more=value))

def test_a_key_that_leaves_something_out_is_noticed(tmp_path):
    make(tmp_path, Teacher())
    with pytest.raises(KdocrError, match=r"taps-\w{16}: tap 'logits' is 1\d\d% apart .* the key leaves out something"): make(tmp_path, Teacher(seed=1))
    late = Teacher(); late.weights['transformer_out'][-1] = 0 # one view of one tap: the last, which the probe looks at
    with pytest.raises(KdocrError, match=r"tap 'transformer_out' is \d\d% apart"): make(tmp_path, late)
    late.weights['transformer_out'][-1] = float('nan')
    with pytest.raises(KdocrError, match="tap 'transformer_out' is nan% apart"): make(tmp_path, late)

def test_other_arithmetic_is_no_other_teacher(tmp_path):
    exact = _taps_dict(make(tmp_path, Teacher()).take(ROWS, VIEWS))
    rough = Teacher(); rough.weights = {k: w.bfloat16().float() for k, w in rough.weights.items()}
    assert same(_taps_dict(make(tmp_path, rough).take(ROWS, VIEWS)), exact)

def test_a_teacher_that_draws_random_numbers_is_refused(tmp_path):
    def drops(rows, views): return TapOut(torch.nn.functional.dropout(torch.ones(len(rows), T, 50)), {})
    with pytest.raises(KdocrError, match="tap 'logits' .* it is not frozen, or its view is drawn anew"): make(tmp_path, drops)
    assert places(tmp_path) == []

# ---- whole or not at all

def about(place, **changed):
    file = place/'about.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))

def resave(place, x, **kw): # a valid file of another kind, and an about.json that agrees with its size
    np.save(place/'logits.npy', x, **kw)
    told = json.loads((place/'about.json').read_text())['bytes']
    about(place, bytes=told | {'logits': (place/'logits.npy').stat().st_size})

def logits(place): return np.load(place/'logits.npy')

DAMAGE = {
    'no about.json': lambda p: (p/'about.json').unlink(),
    'half an about.json': lambda p: (p/'about.json').write_text((p/'about.json').read_text()[:40]),
    'a list': lambda p: (p/'about.json').write_text('[]'),
    'nothing said': lambda p: (p/'about.json').write_text('{}'),
    'another format': lambda p: about(p, format=tapcache._CACHE_VERSION + 1),
    'another key': lambda p: about(p, key=KEY | dict(teacher='f'*16)),
    'other shapes': lambda p: about(p, shapes={'logits': [N, V, T, 5]}),
    'no sizes': lambda p: about(p, bytes={}),
    'sizes of no kind': lambda p: about(p, bytes=None),
    'cut short': lambda p: os.truncate(p/'logits.npy', (p/'logits.npy').stat().st_size - 2),
    'empty': lambda p: os.truncate(p/'logits.npy', 0),
    'too long': lambda p: os.truncate(p/'logits.npy', (p/'logits.npy').stat().st_size + 2),
    'a tap gone': lambda p: (p/'transformer_out.npy').unlink(),
    'no header': lambda p: (p/'logits.npy').write_bytes(bytes((p/'logits.npy').stat().st_size)),
    'cut short and admitted': lambda p: (os.truncate(p/'logits.npy', 200), about(p, bytes=json.loads((p/'about.json').read_text())['bytes'] | {'logits': 200})),
    'single precision': lambda p: resave(p, logits(p).astype(np.float32)),
    'bf16 under the same name': lambda p: resave(p, logits(p).view(np.uint16)),
    'other axes': lambda p: resave(p, logits(p).reshape(V, N, T, 5)),
    'columns first': lambda p: resave(p, np.asfortranarray(logits(p))),
}

@pytest.mark.parametrize('harm', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_made_again(tmp_path, harm):
    whole = make(tmp_path, Teacher())
    good = _taps_dict(whole.take(ROWS, VIEWS))
    good_about = (whole.folder/'about.json').read_bytes()
    harm(whole.folder)
    teacher = Teacher()
    mended = make(tmp_path, teacher)
    assert sum(teacher.asked) == PROBE + N*V and places(tmp_path) == [whole.folder.name]
    assert same(_taps_dict(mended.take(ROWS, VIEWS)), good) and (whole.folder/'about.json').read_bytes() == good_about
    teacher.asked.clear(); make(tmp_path, teacher)
    assert teacher.asked == [PROBE]

@pytest.mark.parametrize('value, word', [(65520., '65520'), (-1e9, '-1e\\+09'), (float('inf'), 'inf'), (float('nan'), 'nan')])
def test_a_value_beyond_half_precision_is_refused_by_name(tmp_path, value, word):
    teacher = Teacher(); teacher.weights['backbone_out'][7*V + 1, 3] = value # track row 7, view 1: not among the four of the probe
    with pytest.raises(KdocrError, match=f"tap 'backbone_out', track row 7, view 1: {word} has no place in half precision.*`teacher_cache: off`"): make(tmp_path, teacher)
    assert places(tmp_path) == []

def test_an_error_half_way_leaves_nothing(tmp_path):
    teacher = Teacher()
    def fails(rows, views):
        if rows[-1] == N - 1 and len(teacher.asked) > 3: raise RuntimeError('out of memory')
        return teacher(rows, views)
    with pytest.raises(RuntimeError, match='out of memory'): make(tmp_path, fails)
    assert places(tmp_path) == [] and len(teacher.asked) > 3

@pytest.mark.parametrize('changes', [lambda o: TapOut(o.logits, {}), lambda o: TapOut(o.logits[:, :-1], o.taps), lambda o: TapOut(o.logits[:-1], o.taps)])
def test_an_output_that_changes_its_shape_is_named(tmp_path, changes):
    teacher = Teacher()
    def wanders(rows, views): return (changes if 5 in rows.tolist() and len(rows) == 8 else lambda o: o)(teacher(rows, views))
    with pytest.raises(KdocrError, match='teacher taps, track rows 2..5: shapes .* at the start they were'): make(tmp_path, wanders)
    assert places(tmp_path) == []

def test_names_that_are_no_file_names(tmp_path):
    for bad in ('logits', 'a/b', '../a', '/a'):
        with pytest.raises(KdocrError, match='cannot be cached under this name'): make(tmp_path, lambda rows, views: TapOut(torch.ones(len(rows), 1, 1), {bad: torch.ones(len(rows), 1, 1)}))

def test_nothing_to_cache(tmp_path):
    for n, views in ((0, 3), (3, 0)):
        with pytest.raises(KdocrError, match=f'{n} tracks in {views} views'): tap_cache(tmp_path, KEY, n, views, Teacher())

# ---- room

Usage = namedtuple('usage', 'total used free')

def test_too_little_disk_is_said_before_the_work(tmp_path, monkeypatch):
    make(tmp_path, Teacher())
    monkeypatch.setattr(tapcache.shutil, 'disk_usage', lambda folder: Usage(10**12, 10**12 - 10**9, 10**9))
    asked = []
    def huge(rows, views): asked.append(len(rows)); return TapOut(torch.zeros(len(rows), 16, 37), {'backbone_out': torch.zeros(len(rows), 16, 512)})
    with pytest.raises(KdocrError) as e: tap_cache(tmp_path, KEY, 20_000, 8, huge)
    assert asked == [4] and len(places(tmp_path)) == 1
    for words in (str(tmp_path), '20,000 tracks in 8 views', 'need 2.8 GB, 1.0 GB are free', '`n_fixed_augs`', '`teacher_cache: off`', 'older caches'): assert words in str(e.value)

def test_room_to_the_byte(tmp_path, monkeypatch):
    shapes = {'logits': [N, V, T, 5], 'a': [N, V, T, 7]}
    for free in (2*N*V*T*12, 2*N*V*T*12 - 1):
        monkeypatch.setattr(tapcache.shutil, 'disk_usage', lambda folder: Usage(0, 0, free))
        if free % 2 == 0: tapcache._check_disk_space(tmp_path, shapes)
        else:
            with pytest.raises(KdocrError, match='teacher taps'): tapcache._check_disk_space(tmp_path, shapes)

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_a_disk_that_fills_up_is_an_error_and_no_bus_error(tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr(tapcache, 'open', lambda file, mode='r': real('/dev/full' if str(file).endswith('backbone_out.npy') else file, mode), raising=False)
    with pytest.raises(KdocrError, match='No space left on device'): make(tmp_path, Teacher())
    assert places(tmp_path) == []

def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(KdocrError, match='file'): make(tmp_path/'file'/'cache', Teacher())

# ---- several processes

CHILD = '''
import os, signal, sys, time, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_teacher_cache import *
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
teacher = Teacher()
def note(word):
    with open(log, 'a') as f: f.write(word + chr(10))
{body}
make(folder, compute)
'''

def child(body, *args): return subprocess.Popen([sys.executable, '-c', CHILD.format(tests=str(Path(__file__).parent), body=body), *map(str, args)], stderr=subprocess.PIPE, text=True)

TOGETHER = '''
def compute(rows, views):
    note('probe' if not teacher.asked else f'work {len(rows)}')
    while log.read_text().count('probe') < 2: time.sleep(.01) # whoever builds waits for the other to come
    return teacher(rows, views)
'''

@pytest.mark.slow
def test_two_processes_compute_once(tmp_path):
    log = tmp_path/'log'; log.touch()
    both = [child(TOGETHER, tmp_path/'cache', log) for _ in range(2)]
    for p in both: assert p.wait(timeout=120) == 0, p.stderr.read()
    lines = log.read_text().split('\n')
    assert lines.count('probe') == 2 and sum(int(x.split()[1]) for x in lines if x.startswith('work')) == N*V
    teacher = Teacher()
    assert torch.equal(make(tmp_path/'cache', teacher).take(ROWS, VIEWS).logits, teacher(ROWS, VIEWS).logits.half().float())

def test_the_second_of_two_threads_waits_and_finds(tmp_path):
    "The lock, without the cost of two processes: the second comes while the first is in the middle of its work."
    inside, go, first, second, got = threading.Event(), threading.Event(), Teacher(), Teacher(), []
    def slow(rows, views):
        if first.asked: inside.set(); assert go.wait(60)
        return first(rows, views)
    def other(rows, views): go.set(); return second(rows, views)
    a = threading.Thread(target=lambda: got.append(make(tmp_path, slow))); a.start()
    assert inside.wait(60)
    got.append(make(tmp_path, other)); a.join(60)
    assert sum(first.asked) == PROBE + N*V and second.asked == [PROBE] and len(got) == 2
    assert same(*(_taps_dict(c.take(ROWS, VIEWS)) for c in got))

KILLED = '''
def compute(rows, views):
    if len(teacher.asked) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return teacher(rows, views)
'''

@pytest.mark.slow
def test_a_killed_build_is_never_used_and_swept_by_the_next(tmp_path):
    p = child(KILLED, tmp_path/'cache', tmp_path/'log')
    assert p.wait(timeout=120) == -signal.SIGKILL
    assert places(tmp_path/'cache') == ['.tmp-taps'] and (tmp_path/'cache/.tmp-taps/logits.npy').is_file()
    teacher = Teacher()
    whole = make(tmp_path/'cache', teacher)
    assert sum(teacher.asked) == PROBE + N*V and places(tmp_path/'cache') == [whole.folder.name]
    assert torch.equal(whole.take(ROWS, VIEWS).logits, teacher(ROWS, VIEWS).logits.half().float())

def test_a_cache_is_found_in_a_folder_that_only_others_may_write(tmp_path, monkeypatch):
    make(tmp_path, Teacher())
    def never(folder): raise PermissionError(13, 'Permission denied', str(folder))
    monkeypatch.setattr(tapcache, 'wait_lock', never) # the tests may run as root, whom no mode stops
    teacher = Teacher()
    make(tmp_path, teacher)
    assert teacher.asked == [PROBE]
    with pytest.raises(KdocrError, match=f'{tmp_path}: Permission denied'): make(tmp_path, teacher, {})

# ---- memory

BIG = '''
import sys, torch
from pathlib import Path
from kdocr.distill.teacher_cache import tap_cache
from kdocr.models.taps import TapOut
n, views = 4000, 4
def compute(rows, views): return TapOut((rows*4 + views).float().sin()[:, None, None].expand(-1, 16, 288), {})  # 147 MB in half precision
def kb(name): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(name))
rows = torch.arange(n).repeat_interleave(views).view(-1, 100); which = torch.arange(views).repeat(n).view(-1, 100)
compute(rows[0], which[0]).logits.half() # what torch sets up at its first call
anon = kb('RssAnon')
cache = tap_cache(Path(sys.argv[1]), {}, n, views, compute)
for r, v in zip(rows, which): assert torch.allclose(cache.take(r, v).logits[:, 3, 5], (r*4 + v).float().sin(), atol=1e-3)
print(cache.nbytes, kb('RssAnon') - anon)
'''

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs Linux')
def test_taking_everything_loads_nothing(tmp_path):
    "Pages of a file belong to the system, which takes them back at will; anonymous memory would be ours."
    for go in ('make', 'find'): r = subprocess.run([sys.executable, '-c', BIG, tmp_path], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    size, anon = map(int, r.stdout.split())
    assert size == 4000*4*16*288*2 and anon*1024 < size/5, f'{anon} kB of our own'
