"""What mkdocs does not find in `nbs`: README and LOG, one API page per module, and the order of the navigation."""
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
GITHUB = 'https://github.com/kdocr/kdocr/blob/main/'
FLOORS = ['data', 'models', 'distill', 'training', 'jobs', 'analysis', 'reader']


def page(path, text, where=''):
    "Return Markdown whose links, written for `path`'s folder, lead to pages of the site, or to GitHub where there are none."
    def link(found):
        target, anchor = re.match(r'([^#]*)(.*)', found[1]).groups()
        if re.match(r'https?:', target) or not target: return found[0]
        inside = (path.parent/target).resolve().relative_to(ROOT).as_posix()
        if inside == 'LOG.md' or inside.startswith('nbs/'): return f']({where}{inside.removeprefix("nbs/")}{anchor})'
        return f']({GITHUB}{inside}{anchor})'
    return re.sub(r'\]\(([^)\s]+)\)', link, text)


def modules():
    "Return each module's name with its floor; the ground floor is ''."
    for file in sorted((ROOT/'kdocr').rglob('[a-z]*.py')):
        yield '.'.join(file.relative_to(ROOT).with_suffix('').parts), file.parent.name.replace('kdocr', '')


def on_files(files, config):
    for name, target in (('README.md', 'index.md'), ('LOG.md', 'LOG.md')):
        files.append(File.generated(config, target, content=page(ROOT/name, (ROOT/name).read_text(encoding='utf-8'))))
    for name, _ in modules(): files.append(File.generated(config, f'api/{name}.md', content=f'# {name.removeprefix("kdocr.")}\n\n::: {name}\n'))
    return files


def on_page_markdown(markdown, page, config, files):
    "Send links of `docs/*.md` that lead out of `nbs` to the right place."
    source = ROOT/'nbs'/page.file.src_uri
    return globals()['page'](source, markdown, '../' * page.file.src_uri.count('/')) if source.is_file() else markdown


def on_config(config):
    nbs = ROOT/'nbs'
    def pages(folder, pattern): return [p.relative_to(nbs).as_posix() for p in sorted((nbs/folder).glob(pattern))]
    lessons = [{'ground floor': pages('.', '0[1-9]*.ipynb')}, *({f: pages(f, '[0-9]*.ipynb')} for f in FLOORS), {'command line': pages('.', '8*.ipynb')}]
    api = [{f or 'ground floor': [f'api/{name}.md' for name, floor in modules() if floor == f]} for f in ('', *FLOORS)]
    config.nav = [{'Home': 'index.md'}, {'Tour': '00_tour.ipynb'}, {'Course': pages('course', '*.ipynb')}, {'Guide': pages('docs', '*.md')},
                  {'Run notebooks': pages('runs', '*.ipynb')}, {'Analysis': pages('analysis', '[a-z]*.ipynb')},
                  {'Library': lessons}, {'API': api}, {'Results': ['LOG.md', *pages('docs/results', '*.md')]}]
    config.nav = [entry for entry in config.nav if all(entry.values())]
    return config
