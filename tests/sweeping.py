"""What the tests of sweeps share: a notebook that trains in a moment, without torch, and goes on from its checkpoint; and who runs it."""
import json
import os
import sys
from pathlib import Path

import nbformat
import psutil

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = "out = ''\nname = ''\nsteps = 6\nseed = 0\npace = 0.08\nballast = 0.0\nbroken = False\ndies = False"
# One cell, as long as a training is: its own lock, a checkpoint and a log at every step, and scores last of all.
TRAINS = '''
import fcntl, json, os, time
from pathlib import Path
import numpy as np
from kdocr.core import atomic_write, write_json
folder = Path(out)/name
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder/'.lock', 'a')
try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: raise RuntimeError('another process is at work on this run')
log, last = folder/'metrics.jsonl', folder/'checkpoints/last.npz'
w, first = (lambda f: (f['w'], int(f['step'])))(np.load(last)) if last.exists() else (np.zeros(8), 0)
kept = [l for l in log.read_text().split('\\n')[:-1] if json.loads(l)['step'] <= first] if log.exists() else []
with atomic_write(log) as tmp: tmp.write_text(''.join(l + '\\n' for l in kept))
with open(folder/'begun', 'a') as f: f.write(f'{first}\\n')
for step in range(first, steps):
    x = np.random.default_rng([seed, step]).normal(size=(16, 8))
    w = w - .1 * x.T @ (x @ w - x[:, 0]) / 16
    with open(log, 'a') as f: f.write(json.dumps(dict(step=step + 1, loss=float(((x @ w - x[:, 0])**2).mean()), seconds=step * .1)) + '\\n')
    with atomic_write(last) as tmp, open(tmp, 'wb') as f: np.savez(f, w=w, step=step + 1, ballast=np.zeros(int(ballast * 2**20), np.uint8))
    if broken: 1 / 0
    if dies and not first: os._exit(9)
    time.sleep(pace)
write_json(folder/'scores.json', dict(val=dict(n=10, exact_match=float(1 / (1 + abs(w[1:]).sum())), cer=float(w[0])), weights=w.tolist()))'''
# The same command each time: the jobs in a file, `cores` at a time.
COMMAND = '''
import json, sys
from kdocr.core import guard
from kdocr.jobs.queue import Job, run_jobs
plan = json.load(open(sys.argv[1]))
def command():
    rows = run_jobs([Job(*j) for j in plan['jobs']], plan['out'], plan['notebook'], int(sys.argv[2]), retries=plan.get('retries', 2), go_on=True)
    return sum(r.state != 'finished' for r in rows.values())
sys.exit(guard(command))'''


def notebook(path, cell=TRAINS, parameters=PARAMETERS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3')),
                                  cells=[nbformat.v4.new_code_cell(parameters, metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(cell)])
    nbformat.write(nb, path)
    return path


def plan(folder, entries, **values):
    "A plan of jobs for COMMAND: name -> parameters."
    out = folder/'out'
    jobs = [(n, p.get('steps', 6), {**p, 'out': str(out), 'name': n}) for n, p in entries.items()]
    file = folder/'plan.json'
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(out=str(out), notebook=str(notebook(folder/'n.ipynb')), jobs=jobs, **values)))
    return file, out


def undisturbed(folder, **parameters):
    "What the notebook's cells leave in a run that nobody touches, by running them here."
    scope = {}
    exec(PARAMETERS, scope)
    scope.update(parameters, out=str(folder), name='run', pace=0)
    exec(TRAINS, scope)
    return (folder/'run/scores.json').read_bytes()


def quick(folder):
    "The environment for processes that start quickly: papermill's JSON checker compiles a grammar of URLs at its import, which takes longer than all else and which nothing here needs."
    (folder/'less').mkdir(parents=True, exist_ok=True)
    (folder/'less/rfc3987_syntax.py').write_text('raise ImportError')
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(folder/'less'), str(ROOT), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1')


def command(file, cores=2): return [sys.executable, '-c', COMMAND, str(file), str(cores)]


def at_work(out):
    "The processes that work in this folder, by kind."
    found = dict(controller=[], worker=[], kernel=[])
    for p in psutil.process_iter(['pid', 'ppid', 'cmdline']):
        line = ' '.join(p.info['cmdline'] or [])
        if str(out) in line and 'submitit.local._local' in line: found['controller'].append(p)
        elif str(out) in line and 'submitit.core._submit' in line: found['worker'].append(p)
    pids = {p.pid for p in found['worker']}
    found['kernel'] = [p for p in psutil.process_iter(['pid', 'ppid', 'cmdline']) if p.info['ppid'] in pids and 'ipykernel' in ' '.join(p.info['cmdline'] or [])]
    return found
