"""The job scripts on a real SLURM: two nodes, preemption, the time limit, failure, an array. Two slurmd on this machine."""

import json
import os
import shutil
import time

import pytest

from support.cluster import PROGRAMS, ended, job, log, slurm, submit, two_nodes, wait_for, wait_for_job
from support.processes import ROOT, SAVING, assert_equal_weights, launch, state, weights

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM of two nodes; the environment that its commands need."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and SLURM (apt-get install slurm-wlm munge); missing: {', '.join(missing) or 'root'}")
    with two_nodes(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


def say(capsys, *words) -> None:
    with capsys.disabled():
        print("\n", *words, end="")


@pytest.fixture(scope="module")
def config(finished_run):
    return finished_run.parent / "tiny.yaml"


@pytest.fixture(scope="module")
def two_ranks(config, tmp_path_factory):
    """An undisturbed run of two ranks, which synchronise where those of the jobs do: statistics are averaged there."""
    run = tmp_path_factory.mktemp("two") / "run"
    done = launch("train", "--config", config, "--run.folder", run, *SAVING, ranks=2)
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
    slow = cluster | {"program": "tests/support/driven.py", "DISTURB": "slow@1", "SLOW_S": "1"}
    number = submit(slow, tmp_path, "many_nodes.sh", "--partition=low", arguments=arguments(config))
    wait_for_job(cluster, number, lambda _: state(tmp_path / "run").get("step", 0) >= 2, 90)
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
    wait_for_job(cluster, number, lambda _: "restart 0" in log(tmp_path, number), 30)
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
    slow = cluster | {"program": "tests/support/driven.py", "DISTURB": "slow@1"}
    long = ("--run.epochs", "80", "--run.patience", "80")
    # SLURM looks twice a minute which jobs are due a signal before its next look: this one is, after 45 to 75 s.
    number = submit(slow, tmp_path, "one_node.sh", "--signal=B:USR1@45", minutes=2, arguments=arguments(config, *long))
    wait_for_job(cluster, number, lambda found: found["Restarts"] == "1", 150)
    assert state(tmp_path / "run")["status"] == "stopped", log(tmp_path, number)
    first = state(tmp_path / "run")["step"]
    assert first > 0
    wait_for_job(cluster, number, lambda found: found["JobState"] == "PENDING", 30)
    slurm(cluster, "scontrol", "update", f"JobId={number}", "TimeLimit=10")
    wait_for_job(cluster, number, lambda _: state(tmp_path / "run")["step"] > first, 90)
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


def test_a_request_to_stop_that_comes_before_run_sh_listens_is_not_lost(cluster, config, tmp_path, capsys):
    number = submit(cluster, tmp_path, "one_node.sh", before="echo loading; sleep 3", arguments=arguments(config))
    wait_for_job(cluster, number, lambda _: "loading" in log(tmp_path, number), 30)
    slurm(cluster, "scancel", "--batch", "--signal=USR1", number)
    found = ended(cluster, number)
    assert (found["JobState"], state(tmp_path / "run")["status"]) == ("FAILED", "stopped"), log(tmp_path, number)
    assert "it got no further than before: not requeued" in log(tmp_path, number)
    say(
        capsys,
        f"job {number}: asked to stop while it loaded modules, stopped at step {state(tmp_path / 'run')['step']}",
    )


def test_a_job_that_fails_is_not_requeued(cluster, config, tmp_path, capsys):
    failing = cluster | {"program": "tests/support/driven.py", "DISTURB": "raise@2:1"}
    number = submit(failing, tmp_path, "many_nodes.sh", arguments=arguments(config))
    found = ended(cluster, number)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), log(tmp_path, number)
    assert state(tmp_path / "run")["status"] == "failed"
    assert "a fault that was asked for" in log(tmp_path, number)
    assert "not requeued; see" in log(tmp_path, number)
    (tmp_path / "run" / "state.json").write_text('{"status": "stopped", "reason": "file", "step": 1}')
    silent = submit(cluster | {"program": "/dev/null/none"}, tmp_path, "one_node.sh", arguments=arguments(config))
    assert ended(cluster, silent)["JobState"] == "FAILED", log(tmp_path, silent)  # not as the state of before has it
    assert "the processes ended without a word" in log(tmp_path, silent)
    say(capsys, f"job {number}: {found['JobState']}, restarts {found['Restarts']}")


def test_the_doctor_looks_at_the_nodes_of_a_job(cluster, config, tmp_path, capsys):
    looking = cluster | {"program": "launch/doctor.py"}
    number = submit(looking, tmp_path, "many_nodes.sh", arguments=f"(--config {config})")
    assert ended(cluster, number)["JobState"] == "COMPLETED", log(tmp_path, number)
    assert "2 processes on CPU" in log(tmp_path, number)
    assert "all checks passed" in log(tmp_path, number)
    assert "the run is" not in log(tmp_path, number)
    say(capsys, f"job {number}: the doctor found nothing in the way")


def test_a_stop_by_hand_ends_the_job_and_the_next_one_finishes(cluster, config, two_ranks, tmp_path, capsys):
    slow = cluster | {"program": "tests/support/driven.py", "DISTURB": "slow@1"}
    number = submit(slow, tmp_path, "many_nodes.sh", arguments=arguments(config))
    wait_for_job(cluster, number, lambda _: state(tmp_path / "run").get("step", 0) >= 1, 90)
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
    assert results[0]["center"]["loss"] != results[1]["center"]["loss"]
    say(capsys, f"array {number}: 2 runs, COMPLETED")


def test_an_array_does_a_leak_study_and_goes_on_after_its_time_limit(cluster, source, tmp_path, capsys):
    tiny = "--run.epochs 3 --model.name shufflenet_v2_x0_5 --data.image_size 32 --data.global_batch_size 12"
    out = tmp_path / "study"
    words = f"{source} --arms image,lesion --seeds 1 --out {out} {tiny} {' '.join(SAVING)}"
    number = submit(cluster, tmp_path, "leak_study.sh", "--array=0-1", arguments=f"({words})")
    wait_for_job(cluster, f"{number}_0", lambda _: state(out / "runs" / "image-0").get("step", 0) >= 2, 90)
    slurm(cluster, "scancel", "--signal=USR1", "--batch", f"{number}_0")  # as 120 s before the time limit
    found = [ended(cluster, f"{number}_{task}", 120) for task in (0, 1)]
    assert [task["JobState"] for task in found] == ["COMPLETED"] * 2, [log(tmp_path, task["JobId"]) for task in found]
    assert [task["Restarts"] for task in found] == ["1", "0"]
    done = launch("leak_study", *words.split())
    assert "2 of 2 runs are finished" in done.stdout, done.stderr
    say(capsys, f"array {number}: 2 runs of a study, one of them requeued at its time limit")


def test_a_preempted_task_of_an_array_is_requeued_alone(cluster, config, tmp_path, capsys):
    slow = cluster | {"program": "tests/support/driven.py", "DISTURB": "slow@1", "SLOW_S": "1"}
    options = ("--partition=low", "--array=0-1")
    number = submit(slow, tmp_path, "array.sh", *options, run="run-$SLURM_ARRAY_TASK_ID", arguments=arguments(config))
    for task in (0, 1):
        run = tmp_path / f"run-{task}"
        wait_for_job(cluster, f"{number}_{task}", lambda _, run=run: state(run).get("step", 0) >= 2, 90)
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


def test_the_job_script_packs_by_two_tasks_the_bytes_of_one_process(cluster, source, packed, tmp_path, capsys):
    words = f"{source} {tmp_path}/out --size 48x36 --shard-samples 10"
    number = submit(cluster, tmp_path, "pack.sh", "-N2", arguments=f"({words})")
    assert ended(cluster, number)["JobState"] == "COMPLETED", log(tmp_path, number)
    assert "by 2 tasks" in log(tmp_path, number)
    for path in packed.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    say(capsys, f"job {number}: packed by 2 tasks of srun")


def test_the_shell_of_a_job_packs_alone(cluster, source, packed, tmp_path, capsys):
    script = tmp_path / "shell.sh"
    words = f"python -m shards pack {source} {tmp_path}/out --size 48x36 --shard-samples 10"
    script.write_text(f"#!/usr/bin/env bash\nenv | grep ^SLURM | sort\n{words}\n")
    options = ("-N2", "--ntasks=2", "--ntasks-per-node=1", "-o", tmp_path / "job-%j.log")
    number = slurm(cluster, "sbatch", "--parsable", "--chdir", ROOT, *options, script)
    assert ended(cluster, number)["JobState"] == "COMPLETED", log(tmp_path, number)
    assert "by 2 tasks" not in log(tmp_path, number)
    for path in packed.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    say(capsys, f"job {number}: packed by the shell of the job, 1 task")
