"""The job scripts on a real SLURM: two nodes, preemption, the time limit, failure, an array. Two slurmd on this machine."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, SAVING, assert_equal_weights, environment, launch, state, weights

pytestmark = pytest.mark.slurm
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM of two nodes; the environment that its commands need."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and SLURM (apt-get install slurm-wlm munge); missing: {', '.join(missing) or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
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


def submit(cluster, tmp_path, script: str, *options, minutes: int = 10, run="run", **settings) -> str:
    """Submit one of launch/slurm's scripts with the settings at its top changed; the job's number."""
    text = (ROOT / "launch" / "slurm" / script).read_text()
    text = re.sub(r"^#SBATCH --(gpus|cpus).*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^#SBATCH --time=.*", f"#SBATCH --time={minutes}", text, flags=re.MULTILINE)
    text = re.sub(r"^#SBATCH --output=.*", f"#SBATCH --output={tmp_path}/job-%j.log", text, flags=re.MULTILINE)
    for name, value in ({"run": tmp_path / run, "processes": 1} | settings).items():
        text, changed = re.subn(rf"^{name}=.*", f"{name}={value}", text, flags=re.MULTILINE)
        assert changed == 1, name
    path = tmp_path / script
    path.write_text(text)
    return slurm(cluster, "sbatch", "--parsable", "--chdir", ROOT, *options, path)


def job(cluster, number: str) -> dict:
    words = slurm(cluster, "scontrol", "show", "job", "-o", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def hurried(cluster, number: str) -> dict:
    """A job, which starts at once if it waits for its time: one that was requeued would wait for two minutes.

    SLURM sets that time when the requeued job has ended, so it may have to be said more than once.
    """
    found = job(cluster, number)
    if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
        slurm(cluster, "scontrol", "update", f"JobId={number}", "StartTime=now")
    return found


def ended(cluster, number: str, seconds: float = 240) -> dict:
    """Wait for a job's end."""

    def over():
        found = hurried(cluster, number)
        return found if found["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED") else None

    return wait_for(over, seconds)


def log(tmp_path, number: str) -> str:
    path = tmp_path / f"job-{number}.log"
    return path.read_text() if path.is_file() else ""


def say(capsys, *words) -> None:
    with capsys.disabled():
        print("\n", *words, end="")


@pytest.fixture(scope="module")
def config(finished_run):
    return finished_run.parent / "tiny.yaml"


@pytest.fixture(scope="module")
def two_ranks(config, tmp_path_factory):
    """An undisturbed run of two ranks."""
    run = tmp_path_factory.mktemp("two") / "run"
    done = launch("train", "--config", config, "--run.folder", run, ranks=2)
    assert done.returncode == 0, done.stderr
    return run


def arguments(config, *more) -> str:
    return f"(--config {config} {' '.join(SAVING)} {' '.join(more)})"


def test_a_job_on_two_nodes_trains_with_a_world_of_two(cluster, config, two_ranks, tmp_path, capsys):
    number = submit(cluster, tmp_path, "many_nodes.sh", arguments=arguments(config))
    found = ended(cluster, number)
    assert found["JobState"] == "COMPLETED", log(tmp_path, number)
    assert found["NodeList"] == "n[1-2]"
    assert "2 processes on CPU" in log(tmp_path, number)
    assert state(tmp_path / "run")["status"] == "finished"
    assert_equal_weights(weights(tmp_path / "run"), weights(two_ranks))
    say(capsys, f"job {number}: two nodes, {found['JobState']}, weights equal those without SLURM")


def test_a_preempted_job_is_requeued_and_ends_with_the_weights_of_an_undisturbed_run(
    cluster, config, two_ranks, tmp_path, capsys
):
    slow = cluster | {"program": "tests/driven.py", "DISTURB": "slow@1", "SLOW_S": "1"}
    number = submit(slow, tmp_path, "many_nodes.sh", "--partition=low", arguments=arguments(config))
    wait_for(lambda: state(tmp_path / "run").get("step", 0) >= 2, 90)
    urgent = slurm(cluster, "sbatch", "--parsable", "-p", "high", "-N2", "-o", "/dev/null", "--wrap", "srun sleep 1")
    assert ended(cluster, urgent, 120)["JobState"] == "COMPLETED"
    assert job(cluster, number)["Restarts"] == "1", log(tmp_path, number)
    stopped = state(tmp_path / "run")
    found = ended(cluster, number)
    assert found["JobState"] == "COMPLETED", log(tmp_path, number)
    assert stopped["step"] < 15  # it had not been done before
    assert_equal_weights(weights(tmp_path / "run"), weights(two_ranks))
    say(
        capsys,
        f"job {number}: preempted by {urgent} at step {stopped['step']} ({stopped['status']}), restarts "
        f"{found['Restarts']}, {found['JobState']}, weights equal",
    )


def test_a_job_that_is_preempted_while_its_processes_start_is_requeued(cluster, config, two_ranks, tmp_path, capsys):
    number = submit(cluster, tmp_path, "many_nodes.sh", "--partition=low", arguments=arguments(config))
    wait_for(lambda: "restart 0" in log(tmp_path, number), 30)
    urgent = slurm(cluster, "sbatch", "--parsable", "-p", "high", "-N2", "-o", "/dev/null", "--wrap", "srun sleep 1")
    assert ended(cluster, urgent, 120)["JobState"] == "COMPLETED"
    assert job(cluster, number)["Restarts"] == "1", log(tmp_path, number)
    stopped = state(tmp_path / "run")
    assert stopped.get("step", 0) == 0
    assert ended(cluster, number)["JobState"] == "COMPLETED", log(tmp_path, number)
    assert_equal_weights(weights(tmp_path / "run"), weights(two_ranks))
    assert "preempted: requeued, to go on from step 0" in log(tmp_path, number)
    say(capsys, f"job {number}: preempted by {urgent} at its start, {stopped.get('status')}, COMPLETED, weights equal")


def test_a_job_at_its_time_limit_requeues_itself_and_continues_until_it_is_cancelled(cluster, config, tmp_path, capsys):
    slow = cluster | {"program": "tests/driven.py", "DISTURB": "slow@1"}
    long = ("--run.epochs", "80", "--run.patience", "80")
    # SLURM looks twice a minute which jobs are due a signal before its next look: this one is, after 45 to 75 s.
    number = submit(slow, tmp_path, "one_node.sh", "--signal=B:USR1@45", minutes=2, arguments=arguments(config, *long))
    wait_for(lambda: job(cluster, number)["Restarts"] == "1", 150)
    assert state(tmp_path / "run")["status"] == "stopped", log(tmp_path, number)
    first = state(tmp_path / "run")["step"]
    assert first > 0
    wait_for(lambda: job(cluster, number)["JobState"] == "PENDING", 30)
    slurm(cluster, "scontrol", "update", f"JobId={number}", "TimeLimit=10")
    wait_for(lambda: hurried(cluster, number) and state(tmp_path / "run")["step"] > first, 90)
    slurm(cluster, "scancel", number)
    wait_for(lambda: state(tmp_path / "run")["status"] == "stopped", 30)
    wait_for(lambda: "cancelled: not requeued" in log(tmp_path, number), 30)
    time.sleep(3)
    found = job(cluster, number)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "1")
    assert "requeued, to go on from step" in log(tmp_path, number)
    say(
        capsys, f"job {number}: at its limit at step {first}, restarts {found['Restarts']}, went on, then was cancelled"
    )


def test_a_job_that_fails_is_not_requeued(cluster, config, tmp_path, capsys):
    failing = cluster | {"program": "tests/driven.py", "DISTURB": "raise@2:1"}
    number = submit(failing, tmp_path, "many_nodes.sh", arguments=arguments(config))
    found = ended(cluster, number)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), log(tmp_path, number)
    assert state(tmp_path / "run")["status"] == "failed"
    assert "a fault that was asked for" in log(tmp_path, number)
    assert "not requeued; see" in log(tmp_path, number)
    say(capsys, f"job {number}: {found['JobState']}, restarts {found['Restarts']}")


def test_the_doctor_looks_at_the_nodes_of_a_job(cluster, config, tmp_path, capsys):
    looking = cluster | {"program": "launch/doctor.py"}
    number = submit(looking, tmp_path, "many_nodes.sh", arguments=f"(--config {config})")
    assert ended(cluster, number)["JobState"] == "COMPLETED", log(tmp_path, number)
    assert "2 processes on CPU" in log(tmp_path, number)
    assert "nothing is in the way of a run" in log(tmp_path, number)
    assert "the run is" not in log(tmp_path, number)
    say(capsys, f"job {number}: the doctor found nothing in the way")


def test_a_stop_by_hand_ends_the_job_and_the_next_one_finishes(cluster, config, two_ranks, tmp_path, capsys):
    slow = cluster | {"program": "tests/driven.py", "DISTURB": "slow@1"}
    number = submit(slow, tmp_path, "many_nodes.sh", arguments=arguments(config))
    wait_for(lambda: state(tmp_path / "run").get("step", 0) >= 1, 90)
    (tmp_path / "run" / "stop").touch()
    found = ended(cluster, number)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), log(tmp_path, number)
    assert "somebody touched" in log(tmp_path, number)
    again = submit(cluster, tmp_path, "many_nodes.sh", arguments=arguments(config))
    assert ended(cluster, again)["JobState"] == "COMPLETED", log(tmp_path, again)
    assert_equal_weights(weights(tmp_path / "run"), weights(two_ranks))
    say(capsys, f"jobs {number} and {again}: stopped by hand, then finished, weights equal")


def test_an_array_trains_one_run_for_each_seed(cluster, config, tmp_path, capsys):
    number = submit(
        cluster,
        tmp_path,
        "array.sh",
        "--array=0-1",
        run="run-$SLURM_ARRAY_TASK_ID",
        arguments=arguments(config, "--run.seed", "$SLURM_ARRAY_TASK_ID"),
    )
    for task in ("0", "1"):
        found = ended(cluster, f"{number}_{task}")
        assert found["JobState"] == "COMPLETED", log(tmp_path, found["JobId"])
    results = [json.loads((tmp_path / f"run-{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
    assert results[0]["plain"]["loss"] != results[1]["plain"]["loss"]
    say(capsys, f"array {number}: 2 runs, COMPLETED")


def test_a_preempted_task_of_an_array_is_requeued_alone(cluster, config, tmp_path, capsys):
    slow = cluster | {"program": "tests/driven.py", "DISTURB": "slow@1", "SLOW_S": "1"}
    options = ("--partition=low", "--array=0-1")
    number = submit(slow, tmp_path, "array.sh", *options, run="run-$SLURM_ARRAY_TASK_ID", arguments=arguments(config))
    for task in (0, 1):
        wait_for(lambda task=task: state(tmp_path / f"run-{task}").get("step", 0) >= 2, 90)
    tasks = {task: job(cluster, f"{number}_{task}") for task in (0, 1)}
    last = next(task for task, found in tasks.items() if found["JobId"] == number)  # has the number of the whole array
    node = tasks[last]["NodeList"]
    urgent = slurm(cluster, "sbatch", "--parsable", "-p", "high", "-w", node, "-o", "/dev/null", "--wrap", "sleep 1")
    assert ended(cluster, urgent, 120)["JobState"] == "COMPLETED"
    found = {task: ended(cluster, f"{number}_{task}") for task in (0, 1)}
    assert {task: (job["JobState"], job["Restarts"]) for task, job in found.items()} == {
        last: ("COMPLETED", "1"),
        1 - last: ("COMPLETED", "0"),
    }
    say(capsys, f"array {number}: task {last} preempted by {urgent} and requeued, the other undisturbed")
