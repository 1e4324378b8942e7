"""Packing by many tasks gives the bytes of one process, whoever is killed and whenever, and never half a dataset."""

import hashlib
import itertools
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from shards import cli
from shards import pack as pack_module
from shards import places as places_module
from shards.index import load, load_table, verify
from shards.places import FolderPlace
from shards.public_data import Columns
from shards.sources import read_source
from shards.split import split_by_lesion
from shards.tasks import Task, cut, share, this_task
from support.packing import draw_source, pack_task, words_of
from support.processes import ROOT, environment


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


DAMAGED = (0, 3, 9, 14, 15, 22, 31, 46, 47, 66, 80)  # in every part of the source


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Images of which none is damaged."""
    draw_source(folder := tmp_path_factory.mktemp("whole") / "source")
    return folder


@pytest.fixture(scope="module")
def one_process(whole, tmp_path_factory) -> Path:
    """What one process makes of them."""
    pack_task(whole, [out := tmp_path_factory.mktemp("one") / "out"])
    return out


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """The same, eleven of them damaged."""
    draw_source(folder := tmp_path_factory.mktemp("damaged") / "source", DAMAGED)
    return folder


@pytest.fixture(scope="module")
def skipped(damaged, tmp_path_factory) -> Path:
    """What one process makes of that, in two sizes: folders `out` and `small`."""
    folder = tmp_path_factory.mktemp("skipped")
    pack_task(damaged, [folder / "out", folder / "small"], bad="skip")
    return folder


def finish(source: Path, outs: list, order: list[int], size: int, bad: str = "fail") -> None:
    """Run the tasks one after the other; the datasets are there after the last one, and not before."""
    for number, rank in enumerate(order):
        packed = pack_task(source, outs, rank, size, bad)
        assert set(packed.unfinished) == set(order[number + 1 :])
        assert bool(packed.descriptions) == (number == len(order) - 1)
        for out in outs:
            assert (out / "dataset.json").exists() == (number == len(order) - 1)


@pytest.mark.parametrize("order", [[0], [1, 0], [0, 1], [2, 0, 1], [0, 1, 2], [20, *range(20)]])
def test_any_number_of_tasks_in_any_order_gives_the_bytes_of_one_process(whole, one_process, tmp_path, order):
    finish(whole, [tmp_path / "out"], order, len(order))  # 21 tasks are more than there are shards
    assert digests(tmp_path / "out") == digests(one_process)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("order", [[0], [1, 0], [0, 1], [2, 0, 1], [0, 1, 2], [2, 1, 0]])
def test_keys_are_consecutive_where_images_of_other_tasks_are_skipped(damaged, skipped, tmp_path, order):
    outs = [tmp_path / "out", tmp_path / "small"]
    finish(damaged, outs, order, len(order), "skip")
    for out in outs:
        assert digests(out) == digests(skipped / out.name)
        dataset = load(out)
        assert pd.concat(load_table(dataset, shard) for shard in dataset.shards)["key"].tolist() == list(
            range(len_of(out))
        )
        assert dataset.description.warnings[-1].startswith("11 of 84 images could not be read")
        assert verify(out) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]


def len_of(out: Path) -> int:
    return sum(shard.samples for shard in load(out).shards)


def test_tasks_that_skip_know_what_those_before_them_skipped(damaged, skipped, tmp_path, monkeypatch):
    def never(*words):
        raise AssertionError("a shard was numbered again")

    monkeypatch.setattr("shards.commit.renumber", never)
    for rank in range(10):  # a shard each
        pack_task(damaged, [tmp_path / "out"], rank, 10, "skip")
    assert digests(tmp_path / "out") == digests(skipped / "out")


def test_a_task_with_an_image_that_cannot_be_read_names_it_and_is_repeated_alone(
    whole, one_process, tmp_path, capsys, monkeypatch
):
    folder, out = shutil.copytree(whole, tmp_path / "source"), tmp_path / "out"
    images = read_source(folder, Columns()).images
    victim = Path(images["path"].iloc[cut(split_by_lesion(images), 10)[4].rows[3]])  # in a shard of task 1
    victim.write_bytes(victim.read_bytes()[:60])
    words = words_of(folder, out)[3:-2]

    def run(rank: str) -> tuple[int, str]:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        code, said = cli.main(words), capsys.readouterr()
        return code, said.out + said.err

    (code, error), *others = run("1"), run("0"), run("2")
    assert code == 1
    assert "task 1 of 3: 1 image(s) cannot be read, and the dataset is not complete without them" in error
    assert "RANK=1 WORLD_SIZE=3" in error
    assert victim.name in error
    assert [code for code, _ in others] == [0, 0]
    assert "out is NOT complete yet: 2 of 3 tasks are not done (1, 2)" in others[0][1]
    assert "out is NOT complete yet: 1 of 3 tasks are not done (1)" in others[1][1]
    assert "task 1 FAILED: 1 image(s) cannot be read" in others[1][1]
    assert not out.exists()
    shutil.copy(next(whole.rglob(victim.name)), victim)
    code, said = run("1")
    assert (code, "by 3 tasks" in said) == (0, True)
    assert digests(out) == digests(one_process)


def test_a_task_that_failed_may_be_repeated_so_that_it_skips(damaged, skipped, tmp_path):
    for rank in (0, 1):
        with pytest.raises(ValueError, match="leave them out: --on-bad-image skip"):
            pack_task(damaged, [tmp_path / "out"], rank, 2)
    for rank in (0, 1):
        pack_task(damaged, [tmp_path / "out"], rank, 2, "skip")
    assert digests(tmp_path / "out") == digests(skipped / "out")


class Killed(BaseException):
    """A kill, for a process that shall go on."""


def kill_at(monkeypatch, number: int) -> None:
    """End the packing before this file is put."""
    left, take = [number], FolderPlace.take

    def dying(self, path, name):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        take(self, path, name)

    monkeypatch.setattr(FolderPlace, "take", dying)


@pytest.mark.parametrize("killed_at", [0, 1, 2, 3, 8, 12, 16, 17, 19, 22])
def test_a_task_that_was_killed_goes_on_where_it_was(whole, one_process, tmp_path, killed_at):
    out = tmp_path / "out"
    pack_task(whole, [out], 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, killed_at)
        with pytest.raises(Killed):
            pack_task(whole, [out], 0, 2)
    assert not out.exists()
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.tar")}
    records = {path.stem for path in (tmp_path / "out.packing").glob("*-000*.json")}
    pack_task(whole, [out], 0, 2)
    assert digests(out) == digests(one_process)
    for name in records:  # not packed again
        assert (out / f"{name}.tar").stat().st_ino == before[f"{name}.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_shard_of_which_no_image_could_be_read_is_done_at_the_next_start(tmp_path, size):
    draw_source(source := tmp_path / "source", (5,))
    words = {"size": size, "bad": "skip", "shard_samples": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.pack.commit", lambda *words: (_ for _ in ()).throw(Killed()))
        patch.setattr("shards.pack._give_up", lambda *words: None)  # as after a kill
        for rank in range(size):
            with suppress(Killed):
                pack_task(source, [tmp_path / "out"], rank, **words)
    packed = pack_task(source, [tmp_path / "out"], 0, **words)
    assert packed.descriptions[0].left_out == 1


def test_two_processes_do_not_pack_one_thing_at_once(whole, one_process, tmp_path, monkeypatch):
    """The second one is refused, and leaves alone what the first one has done."""
    commit, out = pack_module.commit, tmp_path / "out"

    def meanwhile(*words):
        for more in ({}, {"quality": 80}):
            with pytest.raises(
                BlockingIOError, match=r"Another process packs .*out as task 0 at this moment.*srun or torchrun"
            ):
                pack_task(whole, [out], **more)
        commit(*words)

    monkeypatch.setattr(pack_module, "commit", meanwhile)
    pack_task(whole, [out])
    assert digests(out) == digests(one_process)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed_and_a_mounted_folder_refused_before_anything_is_packed(
    whole, one_process, tmp_path, monkeypatch
):
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "set")
    pack_task(whole, [tmp_path / "link"])
    assert (tmp_path / "link").is_symlink()
    assert digests(tmp_path / "disk" / "set") == digests(one_process)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["set"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match=r"is the folder you are in\. Give a new folder inside it"):
        pack_task(whole, [Path()])
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "here")
    with pytest.raises(FileExistsError, match="is where a disk is mounted"):
        pack_task(whole, [tmp_path / "here"])


def test_all_tasks_started_again_complete_what_nobody_did(whole, one_process, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.pack.commit", lambda *words: (_ for _ in ()).throw(Killed()))
        pack_task(whole, [tmp_path / "out"], 0, 2)
        with pytest.raises(Killed):
            pack_task(whole, [tmp_path / "out"], 1, 2)
    assert pack_task(whole, [tmp_path / "out"], 0, 2).descriptions
    assert digests(tmp_path / "out") == digests(one_process)


def test_a_shard_damaged_since_or_whose_original_changed_is_packed_again(whole, one_process, tmp_path):
    folder, out = shutil.copytree(whole, tmp_path / "source"), tmp_path / "out"
    pack_task(folder, [out], 0, 2)
    partial = tmp_path / "out.partial"
    tars = sorted(partial.glob("*.tar"))
    tars[0].write_bytes(tars[0].read_bytes()[:-1] + b"x")
    tars[1].with_suffix(".csv").unlink()
    tars[2].unlink()
    kept = tars[-1].stat().st_ino
    assert pack_task(folder, [out], 0, 2).unfinished == {1: ""}
    assert tars[-1].stat().st_ino == kept
    pack_task(folder, [out], 1, 2)
    assert digests(out) == digests(one_process)


def test_a_file_gone_since_is_named_with_the_task_to_repeat(whole, tmp_path):
    pack_task(whole, [tmp_path / "out"], 0, 2)
    sorted((tmp_path / "out.partial").glob("*.tar"))[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"\.tar is gone\. Start task 0 of 2 again"):
        pack_task(whole, [tmp_path / "out"], 1, 2)
    assert not (tmp_path / "out").exists()


CHANGES = {
    "tasks": {"size": 3},
    "split": {"seed": 1},
    "outputs": {"quality": 91},
    "shard_samples": {"shard_samples": 9},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_packing_in_the_same_place_is_named_and_refused(whole, one_process, tmp_path, change):
    out = tmp_path / "out"
    pack_task(whole, [out], 0, 2)
    there = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for rank in (0, 1):
        words = "outputs" if change == "shard_samples" else change
        with pytest.raises(ValueError, match=rf"another packing that is not complete \(.*{words}.* there, .* here"):
            pack_task(whole, [out], rank, **{"size": 2} | CHANGES[change])
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == there
    pack_task(whole, [out], 1, 2)
    assert digests(out) == digests(one_process)


def test_another_source_in_the_same_place_is_refused(whole, tmp_path):
    pack_task(whole, [tmp_path / "out"], 0, 2)
    other = shutil.copytree(whole, tmp_path / "source")
    (other / "n" / "00.png").rename(other / "n" / "renamed.png")
    with pytest.raises(ValueError, match=r"another packing .*source \w{12} there, \w{12} here"):
        pack_task(other, [tmp_path / "out"], 1, 2)


def test_two_packings_that_begin_at_once_are_not_mixed(whole, tmp_path, monkeypatch):
    """The other one says what it packs between this one's two looks."""
    write = places_module.write

    def meanwhile(place, name, data, scratch):
        write(place, "plan-0123456789abcdef.json", b'{"tasks": 7}', scratch)
        return write(place, name, data, scratch)

    monkeypatch.setattr("shards.records.write", meanwhile)
    with pytest.raises(ValueError, match="tasks 7 there, 2 here"):
        pack_task(whole, [tmp_path / "out"], 0, 2)


def test_what_one_process_left_is_gone_on_with_or_removed(whole, one_process, tmp_path):
    """One process alone: nobody else is at it."""
    for quality in (90, 91):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shards.pack._give_up", lambda *words: None)  # as after a kill
            kill_at(patch, 10)
            with pytest.raises(Killed):
                pack_task(whole, [tmp_path / "out"], quality=quality)
        assert (tmp_path / "out.packing").exists()
    pack_task(whole, [tmp_path / "out"])
    assert digests(tmp_path / "out") == digests(one_process)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_complete_dataset_is_refused_and_a_task_that_comes_late_finds_it(whole, one_process, tmp_path):
    finish(whole, [tmp_path / "out"], [0, 1], 2)
    with pytest.raises(FileExistsError, match="exists already"):
        pack_task(whole, [tmp_path / "out"], 0, 2)
    shutil.rmtree(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderPlace, "clear", lambda self, but=(): None)  # killed before it could tidy up
        finish(whole, [tmp_path / "out"], [0, 1], 2)
    assert (tmp_path / "out.packing").exists()
    assert pack_task(whole, [tmp_path / "out"], 0, 2).descriptions
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests(tmp_path / "out") == digests(one_process)


def test_processes_at_once_give_the_bytes_of_one_and_one_of_them_the_dataset(damaged, skipped, tmp_path):
    words = words_of(damaged, tmp_path / "out", tmp_path / "small")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    tasks = [
        subprocess.Popen(words, env=environment(RANK=str(rank), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3"), **pipes)
        for rank in range(3)
    ]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    assert any("by 3 tasks" in out for out, _ in said)
    for name in ("out", "small"):
        assert digests(tmp_path / name) == digests(skipped / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]


@pytest.fixture
def in_memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def test_packing_behind_a_url_gives_the_same_files_and_dataset_json_last(damaged, skipped, in_memory, tmp_path):
    for size in (1, 3):
        url = f"memory://bucket/{size}"
        for rank in range(size):
            assert not in_memory.exists(f"/bucket/{size}/dataset.json")
            packed = pack_task(damaged, [url, tmp_path / f"small{size}"], rank, size, "skip")
        assert packed.descriptions
        assert verify(url) == []
        found = {
            path.rpartition("/")[2]: in_memory.cat_file(path) for path in in_memory.ls(f"/bucket/{size}", detail=False)
        }
        assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == digests(skipped / "out")
        assert digests(tmp_path / f"small{size}") == digests(skipped / "small")
        with pytest.raises(FileExistsError, match="is a dataset already"):
            pack_task(damaged, [url], 0, size, "skip")
    assert not [path for path in in_memory.find("/bucket") if ".packing" in path]


def test_one_process_killed_while_it_packs_to_a_url_goes_on(whole, one_process, in_memory):
    url, take = "memory://bucket/set", places_module.UrlPlace.take
    for killed_at in (4, 9, 14):
        left = [killed_at]

        def dying(self, path, name, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            take(self, path, name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(places_module.UrlPlace, "take", dying)
            with pytest.raises(Killed):
                pack_task(whole, [url])
        with pytest.raises(FileNotFoundError, match=r"dataset\.json is missing"):
            load(url)
    with pytest.raises(ValueError, match="another packing"):  # nothing in a bucket is removed unasked
        pack_task(whole, [url], quality=91)
    pack_task(whole, [url])
    assert verify(url) == []
    assert load(url).fingerprint == load(one_process).fingerprint


def test_places_that_cannot_be_packed_to_are_refused(whole, in_memory, tmp_path, capsys):
    in_memory.pipe_file("/bucket/mine/notes.txt", b"keep me")
    for place, words in {
        "https://example.org/set": "nothing can be packed to a web server",
        "file:///tmp/set": "is a folder of this machine. Give its path",
        "s3://bucket": "s3://bucket is a whole bucket. Give a folder in it: s3://bucket/NAME",
        "memory://bucket/mine": "memory://bucket/mine holds other files (notes.txt) already",
    }.items():
        assert cli.main(["pack", str(whole), place]) == 1
        assert words in capsys.readouterr().err
    assert in_memory.find("/bucket") == ["/bucket/mine/notes.txt"]


STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "9"}


@pytest.mark.parametrize(
    ("variables", "task"),
    [
        ({}, Task()),
        ({"RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, Task(1, 3, 2)),
        (STEP, Task(5, 8)),
        (STEP | {"RANK": "0", "WORLD_SIZE": "2"}, Task(0, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, Task()),  # the shell of sbatch
        (STEP | {"SLURM_STEP_ID": str(2**32 - 6), "SLURM_STEP_NUM_TASKS": "1"}, Task()),  # that of salloc
    ],
)
def test_the_task_is_that_of_the_launcher_and_a_shell_of_a_job_is_none(variables, task):
    assert this_task(variables) == task


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, r"WORLD_SIZE must be a whole number.*It is missing.*env -u RANK"),
        ({"WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "Got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be 0 to WORLD_SIZE - 1. Got RANK 2 of WORLD_SIZE 2"),
    ],
)
def test_numbers_of_tasks_that_cannot_be_are_refused(variables, words):
    with pytest.raises(ValueError, match=words):
        this_task(variables)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_each_shard_is_one_tasks_and_the_tasks_take_turns(size):
    shares = [list(share(range(17), Task(rank, size))) for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == list(range(17))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(place % size == rank for rank, own in enumerate(shares) for place in own)
