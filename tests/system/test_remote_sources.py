"""Sources in object storage, with a real S3 server: packing gives what it gives from a folder, or an error in time, and leaves nothing behind."""

import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from shards import cli
from shards.index import verify
from shards.remote import Access
from shards.tree import open_source
from support.packing import draw_kinds, draw_source, pack_task, words_of
from support.processes import ROOT, environment
from support.remote import S3, Proxy, s3_variables

pytestmark = pytest.mark.remote
WAIT_S = 600  # for a task, on a machine that others use


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    server = S3(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture
def proxy(s3, monkeypatch, tmp_path):
    between = Proxy(s3.port)
    for name, value in s3_variables(between.port).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield between
    between.close()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    draw_source(folder := tmp_path_factory.mktemp("whole") / "source")
    return folder


@pytest.fixture(scope="module")
def url(s3, whole) -> str:
    return s3.put(whole, "source")


@pytest.fixture(scope="module")
def one_process(whole, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes of the folder."""
    pack_task(whole, [out := tmp_path_factory.mktemp("one") / "out"])
    return of_folder(out)


def of_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def of_bucket(s3: S3, name: str) -> dict[str, bytes]:
    files = s3.files()
    return {path.rpartition("/")[2]: files.cat_file(path) for path in files.ls(f"shards/{name}", detail=False)}


def begin(words: list[str], rank: int = 0, size: int = 1) -> subprocess.Popen:
    variables = {"RANK": str(rank), "WORLD_SIZE": str(size)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(words, env=environment(**variables), **pipes)


def test_each_kind_of_source_is_packed_from_s3_to_the_bytes_of_its_folder(s3, proxy, source, tmp_path):
    kinds = draw_kinds(source, tmp_path / "root")
    (root,), there = kinds.pop("root"), s3.put(tmp_path / "root", "kinds")
    for kind, words in kinds.items():
        for place, out in ((root, "folder"), (there, "s3")):
            first, *more = [word.replace("ROOT", place) for word in words]
            assert (
                cli.main(["pack", first, str(tmp_path / kind / out), *more, "--size", "12x9", "--shard-samples", "9"])
                == 0
            )
        assert of_folder(tmp_path / kind / "s3") == of_folder(tmp_path / kind / "folder"), kind


def test_two_tasks_pack_from_s3_to_s3_and_one_that_was_killed_is_repeated_alone(s3, url, proxy, one_process, tmp_path):
    words, files = words_of(url, "s3://shards/two/out"), s3.files()
    proxy.delay = 0.05
    first, other = (begin(words, rank, 2) for rank in range(2))
    while first.poll() is None and not any("train" in path for path in files.find("shards/two")):
        files.invalidate_cache()
        time.sleep(0.01)
    was_running = first.poll() is None
    first.kill()
    said = [task.communicate(timeout=WAIT_S) for task in (first, other)]
    assert (was_running, other.returncode) == (True, 0), said
    assert "1 of 2 tasks are not done (0)" in said[1][0]
    files.invalidate_cache()
    assert "dataset.json" not in of_bucket(s3, "two/out")
    shutil.rmtree(tmp_path / "tmp")  # of the killed one
    (tmp_path / "tmp").mkdir()
    again = begin(words, 0, 2)
    said = again.communicate(timeout=WAIT_S)
    assert again.returncode == 0, said
    assert of_bucket(s3, "two/out") == one_process
    assert verify("s3://shards/two/out", Access(cache_gb=0)) == []


def pack_in(place: str, out: Path, patience: float) -> None:
    pack_task(open_source(place, patience), [out])


@pytest.mark.parametrize("fault", ["drop", "stall", "refuse", "503"])
def test_packing_goes_on_over_connections_that_break_or_go_silent(url, proxy, one_process, tmp_path, fault):
    source = open_source(url, 20.0)
    proxy.after, proxy.fault, proxy.most = 3_000, fault, 6
    pack_task(source, [tmp_path / "out"])
    assert of_folder(tmp_path / "out") == one_process
    assert proxy.faults == 6


@pytest.mark.parametrize("fault", ["drop", "stall", "refuse", "503"])
def test_a_list_that_is_cut_off_is_asked_for_again(url, proxy, fault):
    proxy.after, proxy.fault, proxy.most = 3_000, fault, 1
    assert len(open_source(url, 20.0).walk()) == 84
    assert proxy.faults == 1


@pytest.mark.parametrize("fault", ["drop", "refuse", "503"])
def test_a_server_that_stays_away_is_said_in_time_and_packing_goes_on(url, proxy, one_process, tmp_path, fault):
    proxy.delay, began = 0.1, []

    def break_off() -> None:
        while not list((tmp_path / "out.packing").glob("train-*.json")):
            time.sleep(0.01)
        began.append(time.monotonic())
        proxy.after, proxy.fault = 0, fault

    thread = threading.Thread(target=break_off)
    thread.start()
    with pytest.raises(ConnectionError, match=f"{url}/./...png could not be read for 12 s"):
        pack_in(url, tmp_path / "out", 12.0)
    thread.join()
    assert time.monotonic() - began[0] < 120  # most of it is the library's own tries
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.tar")}
    assert kept
    proxy.fault, proxy.delay = "", 0.0
    pack_in(url, tmp_path / "out", 12.0)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    assert of_folder(tmp_path / "out") == one_process


def test_an_original_replaced_between_two_starts_of_a_task_is_packed_again(s3, proxy, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "source")
    url, out = s3.put(folder, "replaced/source"), "s3://shards/replaced-out/set"
    pack_task(url, [out], 0, 2)
    before = of_bucket(s3, "replaced-out/set")
    name = next(path.name for path in sorted((folder / "n").iterdir()) if packs(path, before))
    other = folder / "n" / ("00.png" if name != "00.png" else "03.png")
    (folder / "n" / name).write_bytes(other.read_bytes() + b"1")  # no exact copy
    s3.put(folder, "replaced/source")
    for rank in (0, 1):
        pack_task(url, [out], rank, 2)
    pack_task(folder, [tmp_path / "alone"])
    assert of_bucket(s3, "replaced-out/set") == of_folder(tmp_path / "alone")


def packs(path: Path, files: dict[str, bytes]) -> bool:
    """Whether an image is in a shard."""
    name = f"{path.parent.name}/{path.stem}".encode()
    return any(name in data for file, data in files.items() if file.endswith(".csv") and file.startswith("train"))


def test_what_is_missing_or_denied_is_said_at_once(url, proxy, tmp_path, capsys):
    for place, said in {
        "s3://shards/none": "The source s3://shards/none is not a folder",
        "s3://no-such-bucket/source": "s3://no-such-bucket/source",
    }.items():
        assert cli.main(["pack", place, str(tmp_path / "out")]) == 1
        assert said in capsys.readouterr().err
    proxy.fault = "403"
    assert cli.main(["pack", url, str(tmp_path / "out")]) == 1
    assert f"{url} may not be listed" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
