"""What the README promises is tested: each row of its table of faults has its test."""

import ast
import re

from support.processes import ROOT

FAULTS = {
    "the run is killed at any moment, also while it saves": "chaos::killed_at_random_moments",
    "it goes on with fewer or more processes, in the middle of an epoch": "invariance::stopped_on_4_processes_goes_on_with_3",
    "it is asked to stop: SIGTERM, Ctrl-C, SIGUSR1 or `touch RUN/stop`": "train::stopped_in_an_epoch_exits_with_75",
    "it is asked again more than a second later": "stopping::a_second_request_leaves_at_once",
    "it is asked while it validates or evaluates": "stopping::noticed_in_the_middle_of_an_evaluation",
    "`run.time_limit_minutes` is nearly over": "stopping::time_limit_leaves_room",
    "the launcher is killed": "stopping::launcher_was_killed_stop_with_a_checkpoint",
    "one process dies": "failures::a_rank_is_killed",
    "one process hangs for a minute": "failures::a_rank_hangs",
    "one process meets an error": "failures::a_rank_raises",
    "the loss is no number": "failures::a_nan_loss_names_its_step",
    "the weights are no numbers": "failures::weights_that_are_not_finite_are_never_saved",
    "a file of the newest checkpoint is damaged": "checkpoint::damaged_checkpoint_is_named_and_the_one_before",
    "the best weights are damaged": "checkpoint::best_weights_that_are_damaged",
    "the log, `state.json` or `dataset.json` is damaged": "chaos::damaged_between_its_starts",
    "`config.yaml` is damaged": "chaos::damaged_settings_are_refused",
    "the disk is too small for the checkpoints": "chaos::disk_that_is_too_small",
    "the disk fills up": "chaos::disk_that_fills_up",
    "the disk is read-only": "chaos::read_only_disk",
    "the run folder holds other settings": "failures::another_rate_continues_by_force",
    "the run folder belongs to another dataset": "train::another_dataset_under_the_same_run",
    "a checkpoint comes from a newer version": "checkpoint::newer_format",
    "two jobs start on one run folder": "lock::two_jobs_on_one_run_folder",
    "a job died and left its lock": "lock::no_sign_of_life_loses_its_lock",
    "the machine with `run.checkpoint_dir` is lost": "mirror::machine_is_lost",
    "an evaluation loses or repeats a sample": "ranks::lost_or_doubled",
}


def test_each_row_of_the_table_of_faults_has_its_test():
    table = (ROOT / "README.md").read_text().split("### What happens when ...")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:]
    assert rows == list(FAULTS)
    for row, place in FAULTS.items():
        file, _, part = place.partition("::")
        (path,) = (ROOT / "tests").rglob(f"test_{file}.py")
        tree = ast.parse(path.read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert sum(part in name for name in names) == 1, (row, part)


def test_every_setting_that_the_readme_names_exists():
    from harness.config import Config, flat

    named = set(re.findall(r"\b(?:data|augment|model|optim|run|eval)\.[a-z_]+\b", (ROOT / "README.md").read_text()))
    assert {name for name in named if not name.endswith((".py", ".safetensors"))} <= set(flat(Config()))
