"""A real SLURM of two nodes on this machine for the tests of the job scripts, and what they ask of it."""

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from support.processes import ROOT, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
CONF = """
ClusterName=test
SlurmctldHost=HOST(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=DIR/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
StateSaveLocation=DIR/state
SlurmdSpoolDir=DIR/spool-%n
SlurmctldPidFile=DIR/slurmctld.pid
SlurmdPidFile=DIR/slurmd-%n.pid
SlurmctldLogFile=DIR/slurmctld.log
SlurmdLogFile=DIR/slurmd-%n.log
ReturnToService=2
MpiDefault=none
KillWait=10
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=HOST NodeAddr=127.0.0.1 Port=17001 CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname=HOST NodeAddr=127.0.0.1 Port=17002 CPUs=1 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


@contextmanager
def two_nodes(folder: Path):
    """A SLURM of two slurmd; the environment that its commands need. It needs root and PROGRAMS."""
    (folder / "state").mkdir()
    for path in (folder, *folder.parents[:-1]):
        path.chmod(0o755)  # munge accepts no socket in a folder that only its owner can enter
    conf, key = folder / "slurm.conf", folder / "munge.key"
    conf.write_text(CONF.replace("DIR", str(folder)).replace("HOST", socket.gethostname()))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    hosts = Path("/etc/hosts").read_text()
    Path("/etc/hosts").write_text(f"{hosts}\n127.0.0.1 n1 n2\n")  # names of nodes must resolve
    variables = environment(SLURM_CONF=str(conf), ACCELERATE_USE_CPU="true")
    munge = [f"--{name}={folder / f'munge{end}'}" for name, end in (("key-file", ".key"), ("socket", ".socket"))]
    munge += [f"--{name}={folder / f'munged.{name[:3]}'}" for name in ("pid-file", "log-file", "seed-file")]
    try:
        for words in (["munged", "--force", *munge], ["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
            subprocess.run(words, env=variables, check=True, capture_output=True)
        wait_for(lambda: slurm(variables, "sinfo", "-h", "-o", "%D %T", "-p", "low") == "2 idle", 30)
        yield variables
    finally:
        for pid in [*folder.glob("*.pid"), folder / "munged.pid"]:
            if pid.is_file():
                os.kill(int(pid.read_text()), signal.SIGTERM)
        Path("/etc/hosts").write_text(hosts)


def slurm(variables, *words) -> str:
    done = subprocess.run(list(map(str, words)), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def submit(cluster, tmp_path, script: str, *options, minutes=10, run="run", before="", **settings) -> str:
    """Submit one of launch/slurm's scripts with its settings changed and a command before run.sh; the job's number."""
    text = (ROOT / "launch" / "slurm" / script).read_text()
    text = re.sub(r"^#SBATCH --(gpus|cpus).*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^#SBATCH --time=.*", f"#SBATCH --time={minutes}", text, flags=re.MULTILINE)
    text = re.sub(r"^#SBATCH --output=.*", f"#SBATCH --output={tmp_path}/job-%j.log", text, flags=re.MULTILINE)
    common = {"run": tmp_path / run, "processes": 1} if "source launch/slurm/run.sh" in text else {}
    for name, value in (common | settings).items():
        text, changed = re.subn(rf"^{name}=.*", f"{name}={value}", text, flags=re.MULTILINE)
        assert changed == 1, name
    text = text.replace("\nsource launch/slurm/run.sh", f"\n{before}\nsource launch/slurm/run.sh")
    path = tmp_path / script
    path.write_text(text)
    return slurm(cluster, "sbatch", "--parsable", "--chdir", ROOT, *options, path)


def job(cluster, number: str) -> dict:
    words = slurm(cluster, "scontrol", "show", "job", "-o", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def hurried(cluster, number: str) -> dict:
    """A job, which starts in two seconds if it waits for its time: one that was requeued would wait for two minutes.

    SLURM sets that time when the requeued job has ended, so it may have to be said more than once. It refuses a job that
    starts in the second in which it ended ("Job credential revoked"), so "now" is too early.
    """
    found = job(cluster, number)
    waits = found["JobState"] == "PENDING" and found["Reason"] == "BeginTime"
    if waits and datetime.fromisoformat(found["EligibleTime"]) > datetime.now() + timedelta(seconds=3):
        slurm(cluster, "scontrol", "update", f"JobId={number}", "StartTime=now+2")
    return found


def wait_for_job(cluster, number: str, condition, seconds: float) -> dict:
    """Wait until `condition`, which gets the job as SLURM has it; if the job ends before, its log is the error."""
    deadline = time.monotonic() + seconds
    while not condition(found := hurried(cluster, number)):
        if found["JobState"] in OVER or time.monotonic() > deadline:
            said = Path(found["StdOut"])
            raise AssertionError(f"{found}\n{said.read_text() if said.is_file() else 'it said nothing'}")
        time.sleep(0.2)
    return found


def ended(cluster, number: str, seconds: float = 240) -> dict:
    """Wait for a job's end."""
    return wait_for_job(cluster, number, lambda found: found["JobState"] in OVER, seconds)


def log(tmp_path, number: str) -> str:
    path = tmp_path / f"job-{number}.log"
    return path.read_text() if path.is_file() else ""
