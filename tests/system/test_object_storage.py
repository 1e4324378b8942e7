"""Shards in object storage, with a real S3 server: runs give what they give from a disk, whatever happens on the way."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from launch.bench.streamed import PACKAGES
from shards.index import Dataset, load, verify
from shards.remote import Access
from support.packing import draw_source, pack_task, words_of
from support.processes import ROOT, deterministic_log, environment, launch, state
from support.remote import S3, Proxy, s3_variables, serving

pytestmark = pytest.mark.remote


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    server = S3(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def url(s3, packed) -> str:
    return s3.put(packed, "data")


@pytest.fixture
def proxy(s3, monkeypatch):
    between = Proxy(s3.port)
    for name, value in s3_variables(between.port).items():
        monkeypatch.setenv(name, value)
    yield between
    between.close()


def test_other_packages_read_each_image_once_from_the_same_server(s3, url, proxy, packed, tiny, tmp_path):
    words = (
        "--config",
        tiny,
        "--url",
        url,
        "--peers",
        "s3://shards/peers",
        "--rounds",
        "1",
        "--json",
        tmp_path / "out.json",
    )
    done = launch("bench", "remote", *words, timeout=200)
    names = {package for name, package in PACKAGES.items() if importlib.util.find_spec(name)}
    if not names:  # as in CI: one of them wants a numpy of its own
        assert done.returncode == 1
        assert "none is installed: pip install litdata mosaicml-streaming boto3" in done.stderr
        return
    assert done.returncode == 0, done.stderr  # it fails where an image comes twice, is missing, or has other pixels
    rows = json.loads((tmp_path / "out.json").read_text())["pipelines"]
    assert [row["pipeline"].split()[0] for row in rows] == ["this", *names]
    assert not [path for path in s3.files().find("shards") if "peers" in path]  # nothing is left behind


def left_behind(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix == ".part"]


def train(tiny: Path, run: Path, *more, ranks: int = 1, disturb: str = ""):
    words = ("--config", tiny, "--run.folder", run, "--data.patience_s", "20", *more)
    return launch("driven", *words, ranks=ranks, disturb=disturb, timeout=200)


def test_training_resumed_on_fewer_ranks_and_evaluation_give_the_same_bytes_from_s3(url, proxy, tiny, tmp_path):
    assert verify(url, Access(str(tmp_path / "cache"))) == []
    runs, logs, found = {"disk": (), "s3": ("--data.path", url, "--data.cache_dir", tmp_path / "cache")}, [], []
    for name, more in runs.items():
        run = tmp_path / name
        train(tiny, run, *more, ranks=2, disturb="stop@2:0")
        assert state(run)["status"] == "stopped"
        assert state(run)["samples_seen"] > 0
        done = train(tiny, run, *more)
        assert done.returncode == 0, done.stderr
        logs.append(deterministic_log(run))
        data = ("--data", url) if more else ()
        done = launch("evaluate", run, "--views", "dihedral8", "--out", run / "again", *data, ranks=2)
        assert done.returncode == 0, done.stderr
        names = ("metrics.json", "predictions.csv", "again/metrics.json", "again/predictions.csv")
        found.append({name: (run / name).read_bytes() for name in names})
    assert logs[0] == logs[1]
    assert sum("samples" in line for line in logs[0]) > 3
    assert found[0] == found[1]
    assert left_behind(tmp_path / "cache") == []


def test_an_evaluation_by_ranges_without_a_cache_gives_the_same_bytes(url, proxy, finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    words = ("evaluate", finished_run, "--out")
    for name, more in {"disk": (), "s3": ("--data", url, "--cache-gb", "0")}.items():
        done = launch(*words, tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    for name in ("metrics.json", "predictions.csv"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "s3" / name).read_bytes()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("fault", ["drop", "stall", "refuse"])
def test_a_run_goes_on_over_connections_that_break_or_go_silent(url, proxy, tiny, tmp_path, fault):
    proxy.after, proxy.fault, proxy.most = 20_000, fault, 4
    done = train(tiny, tmp_path / "s3", "--data.path", url, "--data.cache_dir", tmp_path / "cache", ranks=2)
    assert done.returncode == 0, done.stderr
    done = train(tiny, tmp_path / "disk", ranks=2)
    assert deterministic_log(tmp_path / "s3") == deterministic_log(tmp_path / "disk")
    assert left_behind(tmp_path / "cache") == []
    assert proxy.faults == 4


def test_a_server_that_stays_away_fails_the_run_in_time_with_its_url_on_each_rank(url, proxy, tiny, tmp_path):
    words = ("--data.path", url, "--data.cache_dir", tmp_path / "cache", "--data.patience_s", "3")
    proxy.fault = "refuse"
    began = time.monotonic()
    done = train(tiny, tmp_path / "run", *words, ranks=2)
    assert (done.returncode, time.monotonic() - began < 40) == (1, True)
    assert f"{url}/dataset.json could not be read for 3 s" in done.stderr + done.stdout


def test_a_rank_that_downloads_for_long_is_not_taken_for_stuck(url, proxy, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("STUCK_S", "2")
    proxy.rate = 20_000  # bytes/s: the first batch, which nothing can be done before, needs at least a shard of 40,960
    words = (
        "--data.path",
        url,
        "--data.cache_dir",
        tmp_path / "cache",
        "--run.epochs",
        "1",
        "--optim.warmup_epochs",
        "0",
    )
    done = train(tiny, tmp_path / "run", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    (epoch,) = [line for line in lines_of(tmp_path / "run") if "waited" in line]
    assert 60 / epoch["images_per_s"] * epoch["waited"] > 2  # seconds; a download is waiting for data


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


READ = """
import sys, time
from shards.index import load
from shards.reader import SplitReader
from shards.remote import Access
import numpy as np, hashlib
url, cache, gigabytes = sys.argv[1:4]
reader = SplitReader(load(url, Access(cache, float(gigabytes), 20.0)), "train")
print("ready", flush=True)
sys.stdin.readline()
sha = hashlib.sha256()
for shard, size in enumerate(reader.shard_sizes):
    for _, data in reader.read(np.full(size, shard), np.arange(size)):
        sha.update(data)
    print("shard", shard, flush=True)
print("sha", sha.hexdigest(), flush=True)
"""


def readers(url: str, cache: Path, gigabytes: float, n: int = 4) -> list[subprocess.Popen]:
    """Processes that read all shards of the training split, one after the other, begun together."""
    words = [sys.executable, "-c", READ, url, str(cache), str(gigabytes)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = [subprocess.Popen(words, **pipes, env=environment(PYTHONPATH=str(ROOT))) for _ in range(n)]
    for process in found:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in found:
        process.stdin.write("\n")
        process.stdin.flush()
    return found


@pytest.fixture(scope="module")
def many(source, tmp_path_factory) -> Dataset:
    """A training split of more than 50 shards of much the same size."""
    from shards.ham10000 import read_ham10000
    from shards.pack import Packing, pack
    from shards.split import split_by_lesion

    out, catalogue = tmp_path_factory.mktemp("many") / "data", read_ham10000(source)
    pack(catalogue, split_by_lesion(catalogue.images), out, Packing(size=(240, 180), shard_samples=1), quiet=True)
    dataset = load(out)
    assert len(dataset.split("train")) >= 50
    return dataset


def test_four_processes_through_a_cache_that_holds_10_of_50_shards_download_each_about_once(many, tmp_path, capsys):
    shards = many.split("train")
    # Index files stand in the cache, too: a table for each shard.
    index = sum(path.stat().st_size for path in many.folder.glob("*.csv"))
    bound = 10 * max(shard.bytes for shard in shards) + index
    most, over = [0], threading.Event()

    def watch(cache: Path) -> None:
        while not over.wait(0.005):
            with suppress(FileNotFoundError):  # what leaves while it is looked at
                most[0] = max(most[0], sum(entry.stat().st_size for entry in os.scandir(cache)))

    with serving(many.folder) as server:
        thread = threading.Thread(target=watch, args=(tmp_path / "cache",))
        thread.start()
        processes = readers(server.url, tmp_path / "cache", bound / 1e9)
        answers = [process.communicate(timeout=100) for process in processes]
        over.set()
        thread.join()
        found = {answer.splitlines()[-1] for answer, _ in answers}
        downloads = sum(server.sent[shard.file] for shard in shards) / sum(shard.bytes for shard in shards)
    assert len(found) == 1, answers
    assert next(iter(found)).startswith("sha")
    with capsys.disabled():
        print(
            f"\n{len(shards)} shards, 4 processes: {downloads:.3f} downloads a shard; most {most[0] / bound:.3f} of the bound"
        )
    assert downloads < 1.5
    assert most[0] <= bound
    assert left_behind(tmp_path / "cache") == []


def test_one_of_four_processes_killed_in_a_download_holds_up_none(many, tmp_path):
    stalled = Counter()

    def fault(name: str, number: int) -> str:
        stalled[name] += name == "train-000005.tar"
        return "stall" if name == "train-000005.tar" and number == 1 else ""

    with serving(many.folder, fault) as server:
        processes = readers(server.url, tmp_path / "cache", 1.0)
        deadline = time.monotonic() + 30
        part = tmp_path / "cache" / (many.split("train")[5].sha256 + ".part")
        while not (stalled["train-000005.tar"] and part.exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        holder = next(process for process in processes if holds(process.pid, part))
        holder.send_signal(signal.SIGKILL)
        began = time.monotonic()
        rest = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes if process is not holder]
        assert time.monotonic() - began < 15
        holder.communicate()
    assert len(set(rest)) == 1
    assert rest[0].startswith("sha")
    assert left_behind(tmp_path / "cache") == []


def holds(pid: int, path: Path) -> bool:
    """Whether a process has the lock of a file."""
    inode = path.stat().st_ino
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return any(int(line[4]) == pid and line[5].endswith(f":{inode}") for line in locks if "->" not in line)


def read_all(url: str, cache: Path) -> None:
    dataset = load(url, Access(str(cache), 1.0, 3.0))
    for shard in dataset.split("train"):
        dataset.folder.open_shard(shard.file, shard.sha256, shard.bytes)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small disk")
def test_a_cache_on_a_full_or_read_only_disk_is_named_and_keeps_nothing(many, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=True)
    try:
        with serving(many.folder) as server:
            (process,) = readers(server.url, disk / "cache", 1.0, n=1)  # the oldest leave: the disk is the bound
            assert process.communicate(timeout=60)[0].splitlines()[-1].startswith("sha")
            shutil.rmtree(disk / "cache")
            with open(disk / "others", "wb") as file:
                file.write(b"\0" * 190_000)
            with pytest.raises(OSError, match=r"disk of the cache folder .* is full.*--data.cache_dir"):
                read_all(server.url, disk / "cache")
            assert left_behind(disk / "cache") == []
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            with pytest.raises(OSError, match=r"cannot be used.*--data.cache_gb 0"):
                load(server.url, Access(str(disk / "cache"), 1.0, 3.0))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def pack_tasks(words: list[str], size: int, ranks=None) -> list[subprocess.Popen]:
    """Tasks of one packing, begun together."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return [
        subprocess.Popen(words, env=environment(RANK=str(rank), WORLD_SIZE=str(size)), **pipes)
        for rank in (range(size) if ranks is None else ranks)
    ]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Images of which six are damaged."""
    draw_source(folder := tmp_path_factory.mktemp("damaged") / "source", (0, 9, 31, 46, 47, 80))
    return folder


def contents(s3: S3, name: str) -> dict[str, bytes]:
    files = s3.files()
    return {path.rpartition("/")[2]: files.cat_file(path) for path in files.ls(f"shards/{name}", detail=False)}


def of_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def one_process(damaged, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    pack_task(damaged, [folder / "out", folder / "small"], bad="skip")
    return folder


def test_three_tasks_pack_to_s3_what_one_packs_to_a_folder(
    s3, url, proxy, damaged, one_process, tiny, tmp_path, capsys
):
    out, small = "s3://shards/packed/out", "s3://shards/packed/small"
    proxy.fault, proxy.after, proxy.most = "drop", 2_000, 3
    tasks = pack_tasks(words_of(damaged, out, small), 3)
    said = [task.communicate(timeout=200) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    assert sum("by 3 tasks" in words for words, _ in said) >= 1
    for name in ("out", "small"):
        assert contents(s3, f"packed/{name}") == of_folder(one_process / name)
        assert verify(f"s3://shards/packed/{name}", Access(str(tmp_path / "cache"))) == []
    assert not [path for path in s3.files().find("shards/packed") if ".packing" in path]
    words = [sys.executable, "-m", "shards", "show", out, "--sheet", str(tmp_path / "sheet.png"), "--cache-gb", "0"]
    assert "images" in subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment()).stdout
    done = train(tiny, tmp_path / "run", "--data.path", out, "--data.cache_dir", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    again = subprocess.run(words_of(damaged, out), capture_output=True, text=True, cwd=ROOT, env=environment())
    assert (again.returncode, "is a dataset already" in again.stderr) == (1, True)


@pytest.mark.parametrize("size", [1, 3])
def test_tasks_killed_at_any_moment_leave_no_dataset_in_s3_until_all_is_there(
    s3, url, proxy, damaged, one_process, size, capsys
):
    name, kills, began = f"killed{size}/out", 0, time.monotonic()
    words, files = words_of(damaged, f"s3://shards/{name}"), s3.files()
    proxy.rate = 300_000  # bytes/s of answers: a task takes seconds
    for rank in range(size):
        for left in (1, 4, 9, None):  # files that there are more when it is killed
            before = len(list_of(files, name))
            (task,) = pack_tasks(words, size, [rank])
            while task.poll() is None and (left is None or len(list_of(files, name)) < before + left):
                time.sleep(0.01)
            kills += task.poll() is None
            task.kill()
            _, error = task.communicate()
            if left is None:
                assert task.returncode == 0, error
            is_complete = "dataset.json" in list_of(files, name)
            if is_complete:
                assert contents(s3, name) == of_folder(one_process / "out")
                break
    assert is_complete
    assert kills >= 2
    with capsys.disabled():
        print(f"\n{size} task(s): {kills} kills, {time.monotonic() - began:.0f} s")


def list_of(files, name: str) -> set[str]:
    files.invalidate_cache()
    with suppress(FileNotFoundError):
        return {path.rpartition("/")[2] for path in files.ls(f"shards/{name}", detail=False)}
    return set()


def test_a_bucket_that_is_missing_is_said_when_packing(url, proxy, damaged):
    words = words_of(damaged, "s3://none/set")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 1
    assert (
        "may not be written" in done.stderr
    )  # this server does not tell a bucket that is missing from one that is another's
    assert "the bucket may be missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1
