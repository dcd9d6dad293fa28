"""In a real browser: every control of every explorer moved in a running JupyterLab, and the report opened from disk with the network off.
KDOCR_SCREENSHOTS names a folder that keeps the pictures of the screen."""
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
import nbformat
import pytest
from kdocr.analysis.report import report
from kdocr.training.train_kd import train_kd
from small_runs import drawn, small

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason='chromium is not installed')]
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
WAIT = 90_000 # ms, for a loaded machine


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A teacher, a control and a distilled student."
    out, quick = tmp_path_factory.mktemp('runs'), dict(steps=4, eval_every=2)
    t = train_kd(small(out, name='teacher', **quick))
    return [t.path] + [train_kd(small(out, name=n, mode='student', teacher_checkpoint=str(t.published), distill_weight=w, **quick)).path for n, w in (('control', 0.), ('distilled', 1.))]

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Where pictures of the screen are kept."
    folder = Path(os.environ.get('KDOCR_SCREENSHOTS') or tmp_path_factory.mktemp('screenshots'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with playwright.sync_playwright() as pw:
        context = pw.chromium.launch_persistent_context(str(tmp_path_factory.mktemp('profile')), executable_path=CHROMIUM, headless=True, args=FLAGS, viewport=dict(width=1280, height=1000))
        context.set_default_timeout(WAIT)
        yield context
        context.close()

def opened(browser):
    "A page, and what goes wrong in it."
    page, wrong = browser.new_page(), []
    page.on('pageerror', lambda e: wrong.append(str(e)))
    return page, wrong


# ---- JupyterLab

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab on loopback, its settings its own: (address, token, root folder)."
    tmp, root, port, token = tmp_path_factory.mktemp('lab'), tmp_path_factory.mktemp('root'), free_port(), secrets.token_hex(8)
    news = tmp/'set/@jupyterlab/apputils-extension'
    news.mkdir(parents=True)
    (news/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}')
    own = {f'JUPYTER{k}_DIR': str(tmp/v) for k, v in (('_CONFIG', 'cfg'), ('_DATA', 'data'), ('_RUNTIME', 'run'), ('LAB_SETTINGS', 'set'), ('LAB_WORKSPACES', 'ws'))}
    cmd = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={root}',
           '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'] + ['--allow-root'] * (os.geteuid() == 0)
    path = {'PYTHONPATH': os.pathsep.join(filter(None, sys.path)), 'OMP_NUM_THREADS': '1'}
    with open(tmp/'lab.log', 'w') as log: p = subprocess.Popen(cmd, env={**os.environ, **own, **path}, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(400):
            if p.poll() is not None: break
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token={token}', timeout=2)
            except OSError: time.sleep(.25); continue
            yield f'http://127.0.0.1:{port}', token, root
            return
        pytest.fail(f'JupyterLab did not start:\n{(tmp/"lab.log").read_text()[-2000:]}')
    finally: p.terminate(); p.wait(30)

def run_all(page):
    "Run all cells. Lab shows `idle` before the kernel is connected, and then drops the command without a word: look, and give it again."
    page.wait_for_selector('.jp-NotebookPanel .jp-Notebook')
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    page.wait_for_selector('.jp-StatusBar-TextItem:has-text("| Idle")')
    for _ in range(6):
        page.wait_for_timeout(700)
        page.click('.lm-MenuBar-itemLabel:text-is("Run")'); page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        try: return page.wait_for_function("() => [...document.querySelectorAll('.jp-InputPrompt')].some(p => /\\[[*0-9]+\\]/.test(p.innerText))", timeout=5000)
        except playwright.TimeoutError: pass
    pytest.fail('Run All Cells did nothing')

BYTES = '''async img => { const b = new Uint8Array(await (await fetch(img.src)).arrayBuffer()); let s = ''; for (const x of b) s += String.fromCharCode(x); return btoa(s) }'''

class Shown:
    "An explorer on a page."
    def __init__(self, page, n):
        self.page, self.box, self.asked = page, page.locator('.kdocr-live').nth(n), []
        self.box.locator('img').wait_for()
        self.box.scroll_into_view_if_needed()

    def picture(self) -> str: return self.box.locator('img').evaluate(BYTES) # base64

    def control(self, name): return self.box.locator(f'.widget-inline-hbox:has(> .widget-label:text-is("{name}")), .widget-inline-hbox:has(> label:text-is("{name}"))')

    def changed(self, before):
        "Wait for another picture; no line of error stands above it."
        end = time.time() + WAIT/1000
        while (now := self.picture()) == before:
            if time.time() > end: pytest.fail(f'the picture did not follow {self.asked[-1]}: {self.box.inner_text()}')
            self.page.wait_for_timeout(20)
        assert not self.box.locator('.kdocr-error').count(), self.box.inner_text()
        return now

    def move(self, name, how=1):
        "how: steps of a slider, index of a choice, indices of several, or a text."
        self.asked.append(name)
        before, c = self.picture(), self.control(name)
        if c.locator('.noUi-handle').count():
            h = c.locator('.noUi-handle')
            h.focus()
            for _ in range(abs(how)): h.press('ArrowRight' if how > 0 else 'ArrowLeft')
        elif c.locator('select').count(): c.locator('select').select_option(index=how)
        else: c.locator('input').fill(how); c.locator('input').press('Enter')
        return self.changed(before)

    def click(self, text):
        self.asked.append(text)
        before = self.picture()
        self.box.locator(f'button:text-is("{text}")').click()
        return self.changed(before)

TRACKS = [('plate', 2), ('motion', 15), ('angle', 6), ('height', 14), *((k, 3) for k in ('blur', 'contrast', 'sharpen', 'radius', 'noise', 'exposure', 'haze', 'night', 'rain', 'glare', 'bloom')), ('quality', -6), ('scenario', 2), ('layout', 1), ('part', 2)]
ALIGNMENT = [('plate', 1), ('measure', 2), ('channel', 3), ('tap', 1), ('part', 1), ('student', 1)]
RUNS = [('runs', [0, 1, 2]), ('terms', [0, 1]), ('show', 2), ('smooth', 3), ('a panel for each', 1)]

def cells(runs):
    "The notebook that is opened: an explorer a cell, the last one beside a training."
    teacher, *students = map(str, runs)
    yield ('from functools import partial\nimport torch\nfrom kdocr.config import make_config\nfrom kdocr.analysis.explore import explore_alignment, explore_runs, explore_tracks, live\nfrom kdocr.training.train_kd import train_kd\n'
           f'torch.set_num_threads(1)\nplates, teacher, students = {drawn()!r}, {teacher!r}, {students!r}')
    yield 'explore_tracks(plates)'
    yield 'explore_alignment(teacher, students, plates)'
    yield 'explore_runs([*students, teacher])'
    yield "cfg = make_config(dict(name='watched', out='runs', data=plates, val_frac=.2, batch_size=8, steps=20, eval_every=5, log_every=1))\nrun = train_kd(cfg, fit=partial(live, share=.5))"

def test_explorers_in_jupyterlab(runs, lab, browser, pictures):
    address, token, root = lab
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells(runs)], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    nbformat.write(nb, root/'explorers.ipynb')
    page, wrong = opened(browser)
    page.goto(f'{address}/lab/tree/explorers.ipynb?token={token}&reset')
    run_all(page)
    tracks = Shown(page, 0)
    page.screenshot(path=pictures/'lab_tracks.png')
    for name, how in TRACKS: tracks.move(name, how)
    tracks.click('draw conditions')
    tracks.move('scenario', 0), tracks.move('layout', 0), tracks.move('part', 0)
    page.screenshot(path=pictures/'lab_tracks_moved.png')
    tracks.move('text', '*7*')
    alignment = Shown(page, 1)
    page.screenshot(path=pictures/'lab_alignment.png')
    for name, how in ALIGNMENT: alignment.move(name, how)
    alignment.move('part', 0)
    alignment.move('plates', 2) # both wrong, after four steps of training
    page.screenshot(path=pictures/'lab_alignment_moved.png')
    many = Shown(page, 2)
    page.screenshot(path=pictures/'lab_runs.png')
    for name, how in RUNS: many.move(name, how)
    many.click('linear')
    page.screenshot(path=pictures/'lab_runs_moved.png')
    watched = Shown(page, 3)
    page.wait_for_function("() => [...document.querySelectorAll('.jp-InputPrompt')].every(p => /^\\[\\d*\\]:?$/.test(p.innerText.trim()) || !p.innerText.trim())")
    watched.move('smooth', 5)
    watched.click('linear')
    page.screenshot(path=pictures/'lab_live.png')
    controls = page.locator('.kdocr-live .widget-slider, .kdocr-live select, .kdocr-live input[type=text]').count()
    assert controls == len(TRACKS) + 1 + len(ALIGNMENT) + 1 + len(RUNS) + 1, 'a control was added and is not moved here' # tracks and text, alignment and plates, runs, smooth of live
    seen = [e.picture() for e in (tracks, alignment, many, watched)]
    assert not page.locator('.jp-OutputArea img:visible').count() - 4, 'a living explorer hides its plain picture'
    assert not page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]:has-text("Error")').count() and not wrong
    page.wait_for_timeout(300)
    page.keyboard.press('Control+s')
    for _ in range(100):
        page.wait_for_timeout(100)
        saved = nbformat.read(root/'explorers.ipynb', 4)
        plain = [o.data['image/png'].replace('\n', '') for c in saved.cells for o in c.outputs if 'image/png' in o.get('data', {})]
        if plain == seen: break
    assert plain == seen, 'the saved notebook shows what was looked at last'
    page.close()
    exported(browser, root/'explorers.ipynb', pictures)

def exported(browser, path, pictures):
    "The saved notebook as HTML: the pictures are there, without kernel, network and widgets."
    from nbconvert import HTMLExporter
    body, _ = HTMLExporter().from_filename(path)
    path.with_suffix('.html').write_text(body, encoding='utf-8')
    page, wrong = opened(browser)
    browser.set_offline(True)
    page.goto(path.with_suffix('.html').as_uri(), wait_until='domcontentloaded')
    assert page.locator('img:visible').count() == 4 and page.locator('img').evaluate_all('xs => xs.every(x => x.complete && x.naturalWidth > 600)')
    assert page.get_by_text('Run this cell for its controls.').count() == 4
    page.screenshot(path=pictures/'export.png', full_page=True)
    browser.set_offline(False)
    page.close()


# ---- the report

def test_the_report_opens_offline(runs, browser, pictures, tmp_path):
    made, asked = report(runs, tmp_path/'a report.html'), []
    page, wrong = opened(browser)
    page.on('request', lambda r: asked.append(r.url))
    browser.set_offline(True)
    page.goto(made.as_uri())
    images = page.locator('img').evaluate_all('xs => xs.map(x => [x.complete, x.naturalWidth, x.getBoundingClientRect().width, x.alt])')
    frames = [i for i in images if i[3].startswith(('LR frame', 'HR frame'))] # shown as large pixels
    assert len(frames) in range(1, 9) and all(done and width > 100 for done, _, width, _ in images)
    assert len(images) > 8 and all(natural > 200 for _, natural, _, alt in images if not alt.startswith(('LR frame', 'HR frame')))
    assert not wrong and all(u.startswith(('file:', 'data:')) for u in asked), asked
    assert not page.locator('.jp-CodeCell .jp-InputArea, .input_area, .highlight').count() and 'import ' not in page.inner_text('body') and 'Traceback' not in page.inner_text('body')
    assert page.locator('h1').count() == 1 and page.locator('.tiles').bounding_box()['y'] < 400 # the answer first
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), 'nothing is wider than the page'
    page.screenshot(path=pictures/'report.png', full_page=True)
    browser.set_offline(False)
    page.close()
