"""Data behind a URL: the same bytes as from a folder, or a sentence; a cache that holds nothing else."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

from shards import cache as cache_module
from shards import storage as storage_module
from shards.cache import Cache, Wanted, seal
from shards.index import Dataset, load, load_table, verify
from shards.leaks import load_groups
from shards.reader import SplitReader
from shards.remote import Access, RemoteFolder
from shards.storage import Storage, is_url, without_secrets
from support.processes import ROOT, environment
from support.remote import serving

pytest.importorskip("aiohttp")


def all_images(dataset: Dataset, split: str = "train") -> list[bytes]:
    reader = SplitReader(dataset, split)
    rows = [(n, row) for n, size in enumerate(reader.shard_sizes) for row in range(size)]
    shards, rows = (np.array(column) for column in zip(*rows, strict=True))
    return [data for _, data in sorted(reader.read(shards, rows))]


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != cache_module.LOCK)


def wanted(data: bytes, download=None, title: str = "a file") -> Wanted:
    return Wanted(hashlib.sha256(data).hexdigest(), len(data), title, download or (lambda: [data]))


def fetch(cache: Cache, data: bytes) -> bytes:
    file = cache.fetch(wanted(data))
    assert file is not None
    with os.fdopen(file, "rb") as opened:
        return opened.read()


@pytest.fixture
def access(tmp_path) -> Access:
    return Access(str(tmp_path / "cache"), 1.0, 3.0)


@pytest.fixture
def in_memory(packed) -> str:
    import fsspec

    files = fsspec.filesystem("memory")
    for path in packed.iterdir():
        files.pipe_file(f"/data/{path.name}", path.read_bytes())
    yield "memory://data"
    files.store.clear()


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
@pytest.mark.parametrize("kind", ["memory", "http", "file"])
def test_a_url_gives_the_bytes_tables_and_groups_of_the_folder(packed, dataset, in_memory, tmp_path, kind, gigabytes):
    access = Access(str(tmp_path / "cache"), gigabytes, 3.0)
    with serving(packed) as server:
        url = {"memory": in_memory, "http": server.url, "file": packed.as_uri() + "/"}[kind]
        remote = load(url, access)
        assert (remote.fingerprint, remote.shards) == (dataset.fingerprint, dataset.shards)
        assert remote.name == {"memory": "data", "http": f"127.0.0.1:{server.server_port}", "file": packed.name}[kind]
        for split in ("train", "val"):
            assert all_images(remote, split) == all_images(dataset, split)
            assert np.array_equal(load_groups(remote, split), load_groups(dataset, split))
        assert load_table(remote, remote.shards[0]).equals(load_table(dataset, dataset.shards[0]))
        assert verify(url, access) == []
    if not gigabytes:
        assert not (tmp_path / "cache").exists()
        return
    for name in files_of(tmp_path / "cache"):
        assert hashlib.sha256((tmp_path / "cache" / name).read_bytes()).hexdigest() == name


def test_what_is_in_the_cache_is_not_downloaded_again_but_the_description_is(packed, access):
    with serving(packed) as server:
        all_images(load(server.url, access))
        before = server.requests.copy()
        all_images(load(server.url, access))
        assert server.requests - before == {"dataset.json": 1}


def test_two_datasets_with_the_same_file_names_share_a_cache_and_no_file(packed, source, tmp_path, access):
    from shards.ham10000 import read_ham10000
    from shards.pack import Packing, pack
    from shards.split import split_by_lesion

    other, catalogue = tmp_path / "other", read_ham10000(source)
    pack(catalogue, split_by_lesion(catalogue.images), other, Packing(size=(40, 30), shard_samples=10), quiet=True)
    with serving(packed) as one, serving(other) as two:
        for server, folder in ((one, packed), (two, other), (one, packed)):
            assert all_images(load(server.url, access)) == all_images(load(folder))


@pytest.mark.parametrize("fault", ["503", "drop", "short", "whole", "stall"])
def test_answers_that_fail_now_and_then_are_asked_for_again(packed, dataset, access, fault, monkeypatch):
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.02)
    monkeypatch.setattr(storage_module, "ATTEMPT_S", 0.2)

    def now_and_then(name, number):
        is_due = number == 1 if fault == "stall" else number % 2
        return (
            fault if name.endswith((".tar", ".csv")) and is_due and (fault != "stall" or name[6:12] == "000000") else ""
        )

    with serving(packed, now_and_then) as server:
        assert all_images(load(server.url, access)) == all_images(dataset)


def test_a_broken_download_goes_on_at_the_byte_where_it_broke(packed, access, dataset, monkeypatch):
    monkeypatch.setattr(storage_module, "CHUNK", 4096)
    shard, broken = dataset.shards[0], [3]
    with serving(packed, lambda name, number: "503" if name == shard.file and number in broken else "") as server:
        storage = Storage(server.url, 3.0)
        assert b"".join(storage.stream(shard.file, shard.bytes)) == (packed / shard.file).read_bytes()
        assert server.sent[shard.file] == shard.bytes


@pytest.mark.parametrize("fault", ["wrong", "short"])
def test_an_object_with_other_bytes_is_refused_by_its_url_and_not_kept(packed, access, fault, monkeypatch):
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.02)
    with serving(packed, lambda name, number: fault if name == "train-000000.csv" else "") as server:
        dataset = load(server.url, access)
        if fault == "wrong":
            with pytest.raises(ValueError, match=f"{server.url}/train-000000.csv is not what was packed"):
                load_table(dataset, dataset.shards[0])
        else:  # each answer brings half of what is missing: slow, and right
            load_table(dataset, dataset.shards[0])
        assert not [name for name in files_of(Path(access.cache_dir)) if name.endswith(".part")]


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_a_shard_that_is_shorter_behind_its_url_is_said_at_once(packed, tmp_path, gigabytes):
    folder = shutil.copytree(packed, tmp_path / "data")
    (folder / "train-000000.tar").write_bytes(b"<html>" * 50)
    with serving(folder) as server:
        dataset, began = load(server.url, Access(str(tmp_path / "cache"), gigabytes, 60.0)), time.monotonic()
        with pytest.raises(ValueError, match=r"train-000000\.tar has 300 bytes instead of"):
            all_images(dataset)
        assert time.monotonic() - began < 30


def test_a_cache_without_a_home_is_said(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("~nobody-of-this-name").expanduser())
    with pytest.raises(OSError, match=r"has no folder .*data\.cache_dir"):
        Access().folder  # noqa: B018 - a property


def test_a_shard_that_changes_under_a_running_job_is_named_and_refused(packed, tmp_path, access):
    folder = shutil.copytree(packed, tmp_path / "data")
    with serving(folder) as server:
        dataset = load(server.url, access)
        data = bytearray((folder / "train-000000.tar").read_bytes())
        data[700] ^= 1
        (folder / "train-000000.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"train-000000.tar is not what was packed.*changed since"):
            all_images(dataset)
        assert any("train-000000.tar differs" in problem for problem in verify(server.url, access))


def test_one_line_of_the_list_of_shards_cut_is_refused(packed, tmp_path, access):
    folder = shutil.copytree(packed, tmp_path / "data")
    lines = (folder / "shards.csv").read_bytes().splitlines(keepends=True)
    (folder / "shards.csv").write_bytes(b"".join(lines[:-1]))
    with serving(folder) as server, pytest.raises(ValueError, match=r"shards.csv is not what was packed"):
        load(server.url, access)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("404", FileNotFoundError, "is missing"),
        ("403", PermissionError, "may not be read"),
        ("401", PermissionError, "expired"),
    ],
)
def test_missing_and_denied_are_said_at_once_without_what_gives_access(packed, access, fault, error, words):
    with serving(packed, lambda name, number: fault) as server:
        url = server.url.replace("http://", "http://user:hunter2@") + "/data?X-Amz-Signature=topsecret"
        began = time.monotonic()
        with pytest.raises(error, match=words) as raised:
            load(url, access)
        assert time.monotonic() - began < 2.0
        assert f"{server.url}/data/dataset.json" in str(raised.value)
        for secret in ("hunter2", "topsecret", "Signature"):
            assert secret not in "".join(traceback.format_exception(raised.value))
        assert raised.value.__context__ is None


def test_a_signature_goes_behind_the_name_of_each_file(packed, access, dataset):
    with serving(packed) as server:
        assert load(f"{server.url}?sig=a%2Bb", access).fingerprint == dataset.fingerprint


def test_a_server_that_is_away_is_waited_for_so_long_and_no_longer(packed, tmp_path):
    with serving(packed) as server:
        url = server.url
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"could not be read for 1 s.*patience_s"):
        load(url, Access(str(tmp_path / "cache"), 1.0, 1.0))
    assert time.monotonic() - began < 3.0


def test_urls_are_told_from_folders_and_secrets_are_cut_out():
    assert all(map(is_url, ("s3://b/x", "hf://datasets/a/b", "HTTPS://h/p", "memory://m")))
    assert not any(map(is_url, ("data/demo", "/a/b", "C:\\data", "c://x", "~/x", "a:b")))
    shown = {
        "s3://key:secret@bucket/x": "s3://bucket/x",
        "https://u:p@h:8/d?sig=1&b=2#c": "https://h:8/d",
        "no url? no: a@b": "no url? no: a@b",
        "(https://h/a?x=1) and s3://k@b/c": "(https://h/a) and s3://b/c",
        "https://user:pa(s's)word@h:9/data/x: no": "https://h:9/data/x: no",
        "'https://h/data?sv=1&sig=A(B)C'": "'https://h/data'",
        "at https://u:<p>@h/d?sig=1.": "at https://h/d.",
    }
    for text, clean in shown.items():
        assert without_secrets(text) == clean


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/passwd.tar", "a/b.tar", "http://h/x.tar", "..tar", "a?b.tar", "a%2f..tar"]
)
def test_names_that_lead_out_of_the_folder_are_refused_behind_a_url_too(packed, tmp_path, access, name):
    from shards.description import read_description

    folder = shutil.copytree(packed, tmp_path / "data")
    text = (folder / "shards.csv").read_text().replace("train-000000.tar", name)
    (folder / "shards.csv").write_text(text)
    description = read_description(folder / "dataset.json")
    description.files["shards.csv"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "dataset.json").write_bytes(description.to_bytes())
    with serving(folder) as server:
        with pytest.raises(ValueError, match="files outside the dataset's folder are not read"):
            load(server.url, access)
        assert set(server.requests) == {"dataset.json", "shards.csv"}


def test_kinds_of_urls_that_are_unknown_or_chained_are_refused(access):
    for url in ("nothing://x/y", "simplecache::s3://b/x"):
        with pytest.raises(ValueError, match=r"cannot be opened|chain of URLs"):
            RemoteFolder(url, access)


def test_a_cached_file_that_was_damaged_since_is_downloaded_again(packed, access, dataset):
    with serving(packed) as server:
        all_images(load(server.url, access))
        cached = Path(access.cache_dir) / dataset.shards[0].sha256
        for damage in (lambda data: data[:-512], lambda data: data[:600] + b"\0" * 600 + data[1200:]):
            cached.write_bytes(damage(cached.read_bytes()))
            assert all_images(load(server.url, access)) == all_images(dataset)
        assert cached.stat().st_mtime_ns == seal(cached.name)
        os.utime(cached)  # touched, with the right bytes: nothing is downloaded
        before = server.requests.copy()
        assert all_images(load(server.url, access)) == all_images(dataset)
        assert server.requests - before == {"dataset.json": 1}


def test_the_least_recently_used_leave_first_and_none_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "USED_S", 0.0)
    cache = Cache(tmp_path / "cache", 400, 1.0)
    blobs = [bytes([n]) * 100 for n in range(7)]
    digests = [hashlib.sha256(blob).hexdigest() for blob in blobs]
    for blob in blobs[:4]:
        assert fetch(cache, blob) == blob
    held = cache.open(digests[0])
    os.close(cache.open(digests[1]))  # used again: 2 is the oldest now
    os.utime(tmp_path / "cache" / digests[0], ns=(0, seal(digests[0])))  # the oldest, and being read
    fetch(cache, blobs[4])
    assert files_of(tmp_path / "cache") == sorted(digests[n] for n in (0, 1, 3, 4))
    os.close(held)
    fetch(cache, blobs[5])
    assert files_of(tmp_path / "cache") == sorted(digests[n] for n in (1, 3, 4, 5))
    assert cache.used() == 400


def test_a_cache_that_is_read_whole_has_no_room_and_says_so_in_time(tmp_path):
    cache = Cache(tmp_path / "cache", 100, 0.3)
    held = cache.fetch(wanted(b"a" * 100))
    assert cache.fetch(wanted(b"b" * 100), waits=False) is None
    with pytest.raises(TimeoutError, match="are being read"):
        cache.fetch(wanted(b"b" * 100))
    os.close(held)
    assert fetch(cache, b"b" * 100) == b"b" * 100
    with pytest.raises(ValueError, match=r"Raise --data.cache_gb"):
        cache.fetch(wanted(b"c" * 101))
    assert len(files_of(tmp_path / "cache")) == 1


def test_threads_that_want_one_file_download_it_once(tmp_path):
    cache, data, downloads = Cache(tmp_path / "cache", 10**6, 5.0), b"x" * 1000, []

    def download():
        downloads.append(1)
        time.sleep(0.1)
        yield data

    def work():
        os.close(cache.fetch(wanted(data, download)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(downloads), files_of(tmp_path / "cache")) == (1, [hashlib.sha256(data).hexdigest()])


HALF = """
import sys, time
from pathlib import Path
from shards.cache import Cache, Wanted
import hashlib
def download():
    yield b"y" * 500
    print("half", flush=True)
    time.sleep(60)
data = b"y" * 1000
Cache(Path(sys.argv[1]), 10**6, 5.0).fetch(Wanted(hashlib.sha256(data).hexdigest(), 1000, "it", download))
"""


def test_a_process_killed_in_a_download_leaves_nothing_and_holds_nobody_up(tmp_path):
    words, pipe = [sys.executable, "-c", HALF, tmp_path / "cache"], {"stdout": subprocess.PIPE}
    process = subprocess.Popen(words, **pipe, env=environment(PYTHONPATH=str(ROOT)))
    assert process.stdout.readline() == b"half\n"
    cache, data = Cache(tmp_path / "cache", 10**6, 5.0), b"y" * 1000
    assert [name[-5:] for name in files_of(tmp_path / "cache")] == [".part"]  # alive: not removed by another process
    assert cache.fetch(wanted(data), waits=False) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    Cache(tmp_path / "cache", 10**6, 5.0)
    assert files_of(tmp_path / "cache") == []
    assert fetch(cache, data) == data


def test_a_loop_that_waits_for_a_download_gives_signs_of_work_and_counts_it_as_waiting(packed, access, monkeypatch):
    import torch

    from harness.data import loader

    monkeypatch.setattr(loader, "SIGN_S", 0.02)
    signs = []
    options = loader.LoaderOptions(2, 2, torch.device("cpu"), works=lambda: signs.append(1))

    def slow(name: str, number: int) -> str:
        time.sleep(0.3 if name.endswith(".tar") else 0.0)
        return ""

    def waited(dataset: Dataset) -> float:
        reader = SplitReader(dataset, "val")
        return sum(batch.waited for batch in loader.evaluation_batches(reader, 8, 0, 1, options))

    with serving(packed, slow) as server:
        assert waited(load(server.url, access)) > 0.25
        assert len(signs) > 5
        signs.clear()
        monkeypatch.setattr(loader, "SIGN_S", 0.001)
        waited(load(packed))
        assert not signs


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/cache cannot be used.*--data.cache_dir"):
        Cache(tmp_path / "file" / "cache", 100, 1.0)


def test_what_gives_access_is_in_no_settings_that_are_written(tiny_config):
    from dataclasses import replace

    from harness.config import flat, to_yaml

    data = replace(tiny_config.data, path="https://user:hunter2@host/data?sig=topsecret")
    config = replace(tiny_config, data=data)
    for text in (to_yaml(config), str(flat(config))):
        assert "https://host/data" in text
        assert "hunter2" not in text
        assert "topsecret" not in text
