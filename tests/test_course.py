"""The course: every lesson has its parts, runs alone from an empty folder, and shows what it showed when it was written."""
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COURSE = Path(__file__).resolve().parent.parent/'nbs/course'
LESSONS = sorted(COURSE.glob('*.ipynb'))
NAMES = ['1_ctc', '2_teacher', '3_plain_distillation', '4_why_it_fails', '5_controls', '6_few_labels',
         '7_your_own_term', '8_reading']
WIDGET = 'application/vnd.jupyter.widget-view+json' # a progress bar


def markdown(nb):
    "All prose of a lesson."
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def solutions(text): return re.findall(r'<details><summary>Solution</summary>\n(.*?)</details>', text, re.S)


def code_of(text): return re.findall(r'```python\n(.*?)```', text, re.S)


def shown(cell):
    "Kind and text of each output; numbers masked, progress bars and warnings left out."
    found = []
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        if out.get('name') == 'stderr' or WIDGET in data: continue
        text = out.get('text') or data.get('text/plain', '')
        masked = re.sub(r'[-+]?\d[\d.,]*', '#', re.sub(r'\s+', ' ', ''.join(text))) # pandas pads by the number's width
        found.append((out['output_type'], sorted(data), re.sub(r'[ #]+', ' ', masked)))
    return found


def test_all_lessons_are_there():
    assert [p.stem for p in LESSONS] == NAMES


@pytest.mark.parametrize('nb', LESSONS, ids=lambda p: p.stem)
def test_a_lesson_has_its_parts(nb):
    text = markdown(nb)
    number = int(nb.stem[0])
    assert re.match(rf'# {number}\. \S.*\n> \S', text), 'a title and a line that says what it is about'
    assert re.search(r'\*\*Goal\.\*\* After this lesson you can ', text) or '**Goal.** After this lesson you know ' in text
    assert re.search(r'\*\*Time\.\*\* \d+ minutes of reading, (\d+ seconds|up to 2 minutes) of computing', text)
    assert re.findall(r'\*\*Exercise (\d)\.\*\*', text) == ['1', '2', '3']
    found = solutions(text)
    assert len(found) == 3 and all(code_of(s) for s in found)
    for code in (c for s in found for c in code_of(s)): compile(code, nb.stem, 'exec')
    following = NAMES[number] if number < len(NAMES) else NAMES[0]
    after = text[text.index('## Next\n'):]
    assert f'({following}.ipynb)' in after, 'a link to the next lesson'
    assert '](../' in after, 'a link to a library notebook'


@pytest.mark.parametrize('nb', LESSONS, ids=lambda p: p.stem)
def test_links_exist(nb):
    for link in re.findall(r'\]\(([^)]+)\)', markdown(nb)):
        if not link.startswith('http'): assert (nb.parent/link.split('#')[0]).exists(), f'{nb.name}: no file {link}'


@pytest.mark.parametrize('nb', LESSONS, ids=lambda p: p.stem)
def test_outputs_are_committed(nb):
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    outs = [o for c in cells for o in c.get('outputs', [])]
    assert any('image/png' in o.get('data', {}) for o in outs), 'no picture'
    assert not any(o.get('name') == 'stderr' or o['output_type'] == 'error' or WIDGET in o.get('data', {}) for o in outs)


def test_the_course_is_small():
    assert sum(p.stat().st_size for p in LESSONS) < 3_000_000


# Two of the eight in CI, all of them by hand: each takes one to two minutes with its solutions.
IN_CI = ('1_ctc', '8_reading')

@pytest.mark.parametrize('nb', [pytest.param(p, marks=pytest.mark.slow if p.stem in IN_CI else pytest.mark.campaign) for p in LESSONS],
                         ids=lambda p: p.stem)
def test_a_lesson_runs_alone(nb, tmp_path, monkeypatch):
    "Every cell and every solution runs from an empty folder; outputs are the committed ones but for numbers."
    monkeypatch.setenv('TMPDIR', str(tmp_path)) # where the lessons share plates and teacher
    lesson = nbformat.read(nb, 4)
    committed = [shown(c) for c in lesson.cells]
    cells, own = [], []
    for cell in lesson.cells:
        own.append(len(cells))
        cells.append(cell)
        if cell.cell_type == 'markdown':
            cells += [nbformat.v4.new_code_cell(code) for s in solutions(cell.source) for code in code_of(s)]
    lesson.cells = cells
    NotebookClient(lesson, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert [shown(cells[i]) for i in own] == committed
