"""What the documents promise is tested: faults, settings, links, files, the README's tree and commands, the Python example."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from harness.config import Config, flat
from support.processes import ROOT

FAULTS = {
    "the run is killed at any moment, even while saving": "chaos::killed_at_random_moments",
    "it resumes on fewer or more processes, in the middle of an epoch": "invariance::stopped_on_4_processes_goes_on_with_3",
    "it receives SIGTERM, Ctrl-C, SIGUSR1 or `touch RUN/stop`": "train::stopped_in_an_epoch_exits_with_75",
    "it receives a second signal after more than 1 s": "stopping::a_second_request_leaves_at_once",
    "it is asked to stop during validation or evaluation": "stopping::noticed_in_the_middle_of_an_evaluation",
    "`run.time_limit_minutes` is nearly over": "stopping::time_limit_leaves_room",
    "the launcher is killed": "stopping::launcher_was_killed_stop_with_a_checkpoint",
    "one process dies": "failures::a_rank_is_killed",
    "one process freezes, also rank 0, or its machine is out of reach for a minute": "failures::rank_0_is_frozen",
    "one process is alive but stuck while others wait for it, for a minute": "failures::alive_but_stuck",
    "rank 0 works for long (a slow disk, a download, intervals of many images)": "failures::wait_for_rank_0_longer",
    "the launcher restarts the processes (`torchrun --max-restarts`) after one died": "failures::launcher_that_restarts_after",
    "an error repeats at each restart, or a run is asked to stop": "failures::an_error_that_repeats_ends_a_launcher",
    "one process raises an error": "failures::a_rank_raises",
    "a process runs out of memory": "failures::runs_out_of_memory",
    "gradients overflow in fp16": "failures::fp16_that_skips",
    "a model has parameters that get no gradient, on several processes": "failures::parameters_without_a_gradient",
    "a bug, or any error that is not expected": "exit::nobody_expected_ends_the_process",
    "an evaluation or packing gets Ctrl-C": "exit::ctrl_c_ends_an_evaluation",
    "the run folder is not on a disk that all machines share": "failures::machines_do_not_share",
    "`WORLD_SIZE` is left over from another launch": "exit::left_over",
    "the loss becomes NaN or Inf": "failures::a_nan_loss_names_its_step",
    "the weights become NaN or Inf": "failures::weights_that_are_not_finite_are_never_saved",
    "a file of the newest checkpoint is damaged": "checkpoint::damaged_checkpoint_is_named_and_the_one_before",
    "the best weights are damaged": "checkpoint::best_weights_that_are_damaged",
    "the log, `state.json` or `dataset.json` is damaged": "chaos::damaged_between_its_starts",
    "`config.yaml` is damaged": "chaos::damaged_settings_are_refused",
    "the disk is too small for the checkpoints": "chaos::disk_that_is_too_small",
    "the disk fills up": "chaos::disk_that_fills_up_loses_nothing",
    "the disk is read-only": "chaos::read_only_disk",
    "the run folder holds other settings": "failures::another_rate_continues_by_force",
    "the run folder belongs to another dataset": "train::another_dataset_under_the_same_run",
    "a checkpoint was written by a newer version": "checkpoint::newer_format",
    "two jobs start on one run folder": "lock::two_jobs_on_one_run_folder",
    "a job died and left its lock": "lock::no_sign_of_life_loses_its_lock",
    "the machine with `run.checkpoint_dir` is lost": "writer::machine_is_lost",
    "a process sees another copy of the run folder": "ranks::another_copy_of_the_checkpoint",
    "an evaluation loses or repeats a sample": "ranks::lost_or_doubled",
}
CONTRIBUTING, README, HARNESS, CHANGELOG = (
    ROOT / "CONTRIBUTING.md",
    ROOT / "README.md",
    ROOT / "harness" / "README.md",
    ROOT / "CHANGELOG.md",
)
IGNORED = {"data", "runs", "build"}  # of the .gitignore; and folders with a dot before their name
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part in IGNORED or part.startswith(".") for part in path.relative_to(ROOT).parts[:1])
)
SETTING = re.compile(r"(?<![\w./])(?:data|augment|model|optim|run|eval)\.[a-z_]+\b(?!\.)")
NO_SETTING = (".py", ".sh", ".json", ".jsonl", ".safetensors", ".onnx", ".pt2")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a document."""
    found, seen = set(), Counter()
    for title in re.findall(r"^#{1,6} +(.+?) *$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def table_below(path: Path, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading, its head left out."""
    part = path.read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_each_row_of_the_table_of_faults_has_its_test():
    assert [row[0] for row in table_below(HARNESS, "## What happens when ...")] == list(FAULTS)
    for row, place in FAULTS.items():
        file, _, part = place.partition("::")
        (path,) = (ROOT / "tests").rglob(f"test_{file}.py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert sum(part in name for name in names) == 1, (row, part)
    assert f"lists {len(FAULTS)} faults" in README.read_text(encoding="utf-8")


@each_document
def test_every_setting_that_a_document_names_exists(path):
    if path == CHANGELOG:
        return  # names the old ones, too: see below
    named = {name for name in SETTING.findall(path.read_text(encoding="utf-8")) if not name.endswith(NO_SETTING)}
    assert named <= set(flat(Config())), sorted(named - set(flat(Config())))


def test_the_changelog_leads_from_settings_that_are_gone_to_settings_that_exist():
    settings = set(flat(Config()))
    for old, new, *_ in table_below(CHANGELOG, "### Changed: settings"):
        assert SETTING.search(old)[0] not in settings, old
        assert SETTING.search(new)[0] in settings, new


@each_document
def test_every_link_of_a_document_leads_somewhere(path):
    text = prose(path)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue  # to the network
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link}: no {target}"
        assert not anchor or anchor in anchors(target), f"{link}: {target} has {sorted(anchors(target))}"


@each_document
def test_every_file_that_a_document_names_exists(path):
    if path == CHANGELOG:
        return  # names the old ones, too
    named = re.findall(r"`((?:shards|harness|launch|configs|tests|\.ci)/[\w./]+)`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_tree_has_every_python_file():
    (tree,) = re.findall(
        r"^```\n(shards/ .*?)^```$", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    named, top, folder = [], "", ""
    for line in tree.splitlines():
        if found := re.match(r"(\w+/)", line):
            top, folder = found[1], found[1]
        elif found := re.match(r"  (\w+/)", line):
            folder = top + found[1]
        elif re.match(r"  \S", line):  # files of the package itself
            folder = top
        named += [folder + name for name in re.findall(r"\w+\.py\b", line)]
    python = {
        name_of(path)
        for package in ("shards", "harness", "launch")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert len(named) == len(set(named))
    assert set(named) == python, f"not there: {sorted(set(named) - python)}; not named: {sorted(python - set(named))}"


def test_the_readme_is_short_and_has_its_two_commands():
    text = README.read_text(encoding="utf-8")
    for command in ("pip install -e . && accelerate launch launch/train.py", 'pip install -e ".[test]" && pytest'):
        assert f"\n```\n{command}\n```\n" in text
    assert len(text.splitlines()) <= 170


def test_the_python_example_runs(finished_run, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```$", HARNESS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert example.count('"runs/demo"') == 1
    exec(compile(example.replace('"runs/demo"', repr(str(finished_run))), name_of(HARNESS), "exec"), {})
    printed = ast.literal_eval(capsys.readouterr().out)
    assert len(printed) == 8
    assert set(printed) <= {"mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"}
