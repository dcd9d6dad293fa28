"""Hands settings.ini to setuptools: one place for name, version, requirements and scripts."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
notebooks = {f'kdocr.nbs{sub}': f'nbs{sub.replace(".", "/")}' for sub in ('', *(f'.{p.name}' for p in sorted((here/'nbs').iterdir()) if p.is_dir()))}

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    license='Apache-2.0', python_requires=f">={cfg['min_python']}",
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=[*find_packages(here, include=['kdocr', 'kdocr.*']), 'kdocr.assets', *notebooks], package_dir=notebooks,
    package_data={'kdocr.assets': ['configs/*.yaml', 'fonts/*', 'reader/*', 'report.css'], **{name: ['*.ipynb', '*.yaml', '*.png'] for name in notebooks}},
    install_requires=cfg['requirements'].split(),
    extras_require={'export': cfg['export_requirements'].split(),
                    'docs': cfg['docs_requirements'].split(),
                    'dev': ' '.join(cfg[f'{extra}_requirements'] for extra in ('dev', 'export', 'docs')).split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()}, zip_safe=False)
