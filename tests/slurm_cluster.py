"""A SLURM cluster of one machine, started for the length of a `with`: munged, slurmctld and slurmd in a folder of their own."""
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'squeue', 'scontrol', 'scancel')

# No cgroups (a container may have none), no accounting, nothing under /etc or /var. `urgent` preempts `main` by requeueing; cred_expire is how long a requeued job waits.
CONF = '''
ClusterName=kdocr
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={d}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes={host} MaxTime=60 PriorityTier=9 PreemptMode=OFF
'''


def absent():
    "Why no cluster can be started here; '' where one can."
    missing = [p for p in PROGRAMS if not _which(p)]
    if missing: return f'SLURM is not installed here (no {", ".join(missing)}): apt-get install slurm-wlm munge'
    return '' if os.geteuid() == 0 else 'slurmd hands jobs to users, and so must be root'


def _which(program): return shutil.which(program, path=f'{os.environ["PATH"]}:/usr/sbin:/sbin')


def _cgroups():
    "The plugin that asks for nothing: since 23.02 there is one for it; before, v1 does not touch what no other plugin uses."
    version = subprocess.run([_which('slurmd'), '-V'], capture_output=True, text=True).stdout
    return 'disabled' if tuple(map(int, re.findall(r'\d+', version)[:2])) >= (23, 2) else 'cgroup/v1'


def _free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def _until(true, what, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end: raise RuntimeError(f'{what} did not come up within {seconds} s')
        time.sleep(.1)


@contextmanager
def _daemon(program, *args, env):
    "A program in the foreground; ended, and killed where that does not help, on the way out."
    p = subprocess.Popen([_which(program), *map(str, args)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try: yield p
    finally:
        p.terminate()
        try: p.wait(10)
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); p.wait()


@contextmanager
def cluster(folder, cpus=2):
    "Yields the environment in which sbatch and its kin talk to the cluster; nothing of it outlives the block."
    folder, host = Path(folder), socket.gethostname().split('.')[0]
    for sub in ('state', 'spool'): (folder/sub).mkdir(parents=True)
    folder.chmod(0o755)
    (folder/'munge.key').write_bytes(os.urandom(128)); (folder/'munge.key').chmod(0o600)
    (folder/'slurm.conf').write_text(CONF.format(folder=folder, host=host, ctld=_free_port(), d=_free_port(), cpus=cpus))
    (folder/'cgroup.conf').write_text(f'CgroupPlugin={_cgroups()}\n')
    env = dict(os.environ, SLURM_CONF=str(folder/'slurm.conf'))
    say = lambda *words: subprocess.run(words, env=env, capture_output=True, text=True)
    with ExitStack() as running:
        start = lambda program, *args: running.enter_context(_daemon(program, *args, env=env))
        start('munged', '--foreground', '--force', f'--socket={folder}/munge.socket', f'--key-file={folder}/munge.key', f'--pid-file={folder}/munge.pid',
              f'--log-file={folder}/munge.log', f'--seed-file={folder}/munge.seed')
        _until((folder/'munge.socket').exists, 'munged')
        start('slurmctld', '-D', '-f', folder/'slurm.conf')
        _until(lambda: 'UP' in say('scontrol', 'ping').stdout, 'slurmctld')
        start('slurmd', '-D', '-N', host, '-f', folder/'slurm.conf')
        _until(lambda: 'idle' in say('sinfo', '-h', '-o', '%T').stdout, 'slurmd')
        try: yield env
        finally:
            say('scancel', '--full', '--signal=KILL', '-u', 'root')
            say('scancel', '-u', 'root')
            _until(lambda: not say('squeue', '-h').stdout.strip(), 'the end of its jobs')


if __name__ == '__main__': # by hand: a shell in the cluster
    import tempfile
    if why := absent(): raise SystemExit(why)
    with tempfile.TemporaryDirectory(prefix='slurm-') as top, cluster(top) as env: subprocess.run([os.environ.get('SHELL', 'bash')], env=env)
