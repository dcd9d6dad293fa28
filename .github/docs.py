"""The notebooks and the README as a folder of HTML: `python .github/docs.py _docs`."""
import html
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {'': '', **{f'/{f}': f': {f}' for f in ('data', 'models', 'distill', 'training', 'jobs', 'analysis', 'reader')}}
PARTS = {**{f'nbs{f}': f'The library{n}' for f, n in FLOORS.items()}, 'nbs/runs': 'Run notebooks'}
PAGE = '''<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>kdocr</title>
<style>body{{max-width:54em;margin:2em auto;padding:0 1em;font:16px/1.55 system-ui,sans-serif;color:#222}}a{{color:#0072b2}}pre,code{{background:#f5f5f5;font-size:.92em}}pre{{padding:.7em;overflow:auto}}
img{{max-width:100%}}table{{border-collapse:collapse}}td,th{{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:left}}nav{{columns:2;font-size:.93em}}nav li{{break-inside:avoid;margin-bottom:.3em}}</style>
{readme}
{lists}</html>'''


def about(nb, name):
    "The title and the line below it."
    first = nb.cells[0].source if nb.cells else ''
    title, line = re.search(r'^# (.+)', first, re.M), re.search(r'^> (.+)', first, re.M)
    return title[1] if title else name, line[1] if line else ''


def build(out, only=None):
    "Write the site; `only`: names of notebooks, all where it is None."
    out, exporter, lists = Path(out), HTMLExporter(template_name='lab', embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True), []
    for part, heading in PARTS.items():
        lines = []
        for path in sorted((ROOT/part).glob('*.ipynb')):
            if only is not None and path.stem not in only: continue
            nb, page = nbformat.read(path, 4), Path(part)/f'{path.stem}.html'
            title, line = about(nb, path.stem)
            text, _ = exporter.from_notebook_node(nb, resources={'metadata': {'name': f'kdocr: {title}', 'path': str(path.parent)}})
            (out/page).parent.mkdir(parents=True, exist_ok=True)
            (out/page).write_text(text, encoding='utf-8')
            lines.append(f'<li><a href="{page.as_posix()}">{html.escape(path.stem)}</a> {markdown2html(line).removeprefix("<p>").strip().removesuffix("</p>")}</li>')
        if lines: lists.append(f'<h2>{heading}</h2><nav><ul>{"".join(lines)}</ul></nav>')
    if (ROOT/'nbs/images').is_dir(): shutil.copytree(ROOT/'nbs/images', out/'nbs/images', dirs_exist_ok=True)
    readme = markdown2html((ROOT/'README.md').read_text(encoding='utf-8'))
    for linked in sorted(set(re.findall(r'href="((?!https?:|#)[^"]+)"', readme))):   # what the README points at goes along
        if (ROOT/linked).is_file(): (out/linked).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/linked, out/linked)
    (out/'index.html').write_text(PAGE.format(readme=readme, lists='\n'.join(lists)), encoding='utf-8')
    (out/'.nojekyll').touch()
    return out/'index.html'


if __name__ == '__main__': print(build(sys.argv[1] if len(sys.argv) > 1 else '_docs'))
