"""Public data sets are fetched whole or not at all, whatever happens on the way."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shards import cli
from shards.fetch import web as web_module
from shards.fetch.command import fetch
from shards.fetch.releases import RELEASES, check_server
from shards.fetch.unzip import unpack
from shards.ham10000 import read_ham10000, read_isic2018
from shards.index import load
from support.processes import ROOT, environment
from support.publisher import publishing, zip_files

PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")
TABLE = "HAM10000_metadata.csv"
PART = f"{PARTS[0]}.zip"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(web_module, "PAUSE_S", 0.01)


@pytest.fixture(scope="session")
def whole(source, tmp_path_factory) -> Path:
    """The drawn lesions as Dataverse has HAM10000: two archives, a table, and something that packing does not need."""
    folder = tmp_path_factory.mktemp("published")
    for part in PARTS:
        zip_files(folder / f"{part}.zip", {path.name: path.read_bytes() for path in (source / part).iterdir()})
    shutil.copy(source / TABLE, folder)
    zip_files(folder / "HAM10000_segmentations_lesion_tschandl.zip", {"a.png": b"a mask"})
    return folder


@pytest.fixture
def published(tmp_path) -> Path:
    """The same layout, tiny: files of random bytes."""
    folder = tmp_path / "published"
    folder.mkdir()
    for part in PARTS:
        zip_files(folder / f"{part}.zip", {f"{part[-1]}{n}.jpg": os.urandom(20_000) for n in range(3)})
    (folder / TABLE).write_bytes(b"lesion_id,image_id\n" * 500)
    return folder


def ham(folder: Path, server, seconds: float = 5, **options) -> tuple[int, int]:
    folder.mkdir(exist_ok=True)
    return fetch(RELEASES["ham10000"], folder, server.url, seconds, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(published: Path) -> dict[str, bytes]:
    """Images and table, as they are to lie in the folder."""
    found = {TABLE: (published / TABLE).read_bytes()}
    for part in PARTS:
        with zipfile.ZipFile(published / f"{part}.zip") as archive:
            found |= {f"{part}/{name}": archive.read(name) for name in archive.namelist()}
    return found


def assert_complete(folder: Path, published: Path) -> None:
    found = contents(folder)
    del found["fetched.json"]
    assert found == expected(published)


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def test_what_is_fetched_packs_as_the_source_does(whole, source, tmp_path, capsys):
    with publishing(whole) as server:
        assert run("fetch", "ham10000", tmp_path / "raw", "--server", server.url) == 0
        said = capsys.readouterr()
        assert server.sent["HAM10000_segmentations_lesion_tschandl.zip"] == 0
    *_, citation, last = said.out.splitlines()
    assert citation.startswith("citation: Tschandl")
    assert "CC BY-NC 4.0" in said.out
    assert last == f"next: python -m shards pack {tmp_path / 'raw'} data/ham10000"
    assert "secret" not in said.out + said.err + (tmp_path / "raw" / "fetched.json").read_text()
    assert_complete(tmp_path / "raw", whole)
    for folder, out in ((tmp_path / "raw", "a"), (source, "b")):
        assert run("pack", folder, tmp_path / out, "--size", "48x36") == 0
    assert contents(tmp_path / "a")["train-000000.tar"] == contents(tmp_path / "b")["train-000000.tar"]
    assert load(tmp_path / "a").description.source["images"] == len(read_ham10000(source).images)


def test_a_complete_folder_is_left_as_it_is_without_asking_a_server(published, tmp_path, capsys):
    with publishing(published) as server:
        assert ham(tmp_path / "raw", server) == (3, 7)
    before = contents(tmp_path / "raw")
    assert run("fetch", "ham10000", tmp_path / "raw", "--server", server.url, "--verify") == 0
    assert "complete, 7 files; nothing to do" in capsys.readouterr().out
    assert contents(tmp_path / "raw") == before


def test_the_test_images_of_isic_2018_come_from_their_bucket(source, tmp_path):
    paths = [Path(path) for path in read_ham10000(source).images["path"][:6]]
    files = {f"TEST_{n}.jpg": path.read_bytes() for n, path in enumerate(paths)}
    bucket, raw, title = tmp_path / "bucket", tmp_path / "raw", "ISIC2018_Task3_Test"
    bucket.mkdir()
    raw.mkdir()
    zip_files(bucket / f"{title}_Input.zip", {f"{title}_Input/{name}": data for name, data in files.items()})
    rows = ["image,MEL,NV,BCC,AKIEC,BKL,DF,VASC", *(f"TEST_{n},1,0,0,0,0,0,0" for n in range(6))]
    truth = f"{title}_GroundTruth/{title}_GroundTruth.csv"
    zip_files(bucket / f"{title}_GroundTruth.zip", {truth: "\n".join(rows).encode()})
    with publishing(bucket) as server:
        fetch(RELEASES["isic2018"], raw, server.url, 5)
    assert set(contents(raw)) == {truth, "fetched.json", *(f"{title}_Input/{name}" for name in files)}
    etag = hashlib.md5((bucket / f"{title}_Input.zip").read_bytes()).hexdigest()
    assert json.loads((raw / "fetched.json").read_text())["downloads"][f"{title}_Input.zip"]["etag"] == f'"{etag}"'
    test = read_isic2018(source, raw).images.query("part == 'test'")
    assert test["image_id"].tolist() == [f"TEST_{n}" for n in range(6)]


@pytest.mark.parametrize("fault", ["drop", "stall", "503", "429"])
def test_faults_that_pass_are_outlived_and_no_byte_comes_twice(published, tmp_path, fault, monkeypatch):
    monkeypatch.setattr(web_module, "ATTEMPT_S", 0.3)
    with publishing(published, lambda name, number: fault if number <= 2 else "") as server:
        ham(tmp_path / "raw", server)
        assert server.requests[PART] == 3
        assert server.sent[PART] == (published / PART).stat().st_size
    assert_complete(tmp_path / "raw", published)


def test_a_server_that_does_not_range_sends_all_again(published, tmp_path):
    with publishing(published, lambda name, number: "drop" if number == 1 else "whole") as server:
        ham(tmp_path / "raw", server)
    assert_complete(tmp_path / "raw", published)


def test_a_server_that_never_gets_further_is_given_up(published, tmp_path):
    def fault(name, number):
        return "drop" if number == 1 else "503"

    with publishing(published, fault) as server:
        with pytest.raises(ConnectionError, match=r"nothing came for 1 s .HTTP 503.*same command continues"):
            ham(tmp_path / "raw", server, seconds=1)
        half = (tmp_path / "raw" / f"{PART}.part").stat().st_size
        assert 0 < half < (published / PART).stat().st_size
        server.fault = lambda name, number: ""
        ham(tmp_path / "raw", server)
        assert server.sent[PART] == (published / PART).stat().st_size


def test_wrong_bytes_never_get_the_name(published, tmp_path):
    with publishing(published, lambda name, number: "wrong" if number == 1 and name == PART else "") as server:
        with pytest.raises(ValueError, match=rf"{PART} .* has the MD5 .* instead of .* is fetched again"):
            ham(tmp_path / "raw", server)
        assert contents(tmp_path / "raw") == {}
        ham(tmp_path / "raw", server)
    assert_complete(tmp_path / "raw", published)


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changed_between_two_calls_is_not_mixed(published, tmp_path, etags):
    with publishing(published, lambda name, number: "drop" if number == 1 else "503") as server:
        server.etags = etags
        with pytest.raises(ConnectionError):
            ham(tmp_path / "raw", server, seconds=1)
    zip_files(published / PART, {f"1{n}.jpg": os.urandom(20_000) for n in range(3)})
    with publishing(published) as server:
        server.etags = etags
        if not etags:  # nothing but the checksum tells
            with pytest.raises(ValueError, match="MD5"):
                ham(tmp_path / "raw", server)
        ham(tmp_path / "raw", server)
    assert_complete(tmp_path / "raw", published)


def test_without_etag_and_checksum_a_part_is_not_continued(published, tmp_path):
    for name in ("Input", "GroundTruth"):
        shutil.copy(published / PART, published / f"ISIC2018_Task3_Test_{name}.zip")
    name = "ISIC2018_Task3_Test_Input.zip"
    with publishing(published, lambda name, number: "drop" if number == 1 else "") as server:
        server.etags = False
        fetch(RELEASES["isic2018"], tmp_path, server.url, 5)
        assert not any("Range" in headers for headers in server.headers)
        assert server.sent[name] == (published / name).stat().st_size + -(-(published / name).stat().st_size // 2)


def test_what_a_server_refuses_is_an_error_with_its_words(published, tmp_path, capsys):
    with publishing(published) as server:
        server.refusal = "You may not download this file without the required Guestbook response"
        assert run("fetch", "ham10000", tmp_path / "raw", "--server", server.url) == 1
        assert "Guestbook response) . Download it with a browser" in capsys.readouterr().err.replace(")", ") ")
        assert run("fetch", "ham10000", tmp_path / "raw", "--server", f"{server.url}/elsewhere") == 1
        assert "is not there (HTTP 404)" in capsys.readouterr().err
        server.refusal, server.listing = "", [entry for entry in server.listing if "part_2" not in entry["label"]]
        assert run("fetch", "ham10000", tmp_path / "raw", "--server", server.url) == 1
        assert "has no HAM10000_images_part_2. It has: HAM10000_images_part_1.zip" in capsys.readouterr().err


def test_a_firewall_that_wants_a_browser_costs_nothing_of_what_came(published, tmp_path):
    with publishing(published, lambda name, number: "drop" if number == 1 else "202") as server:
        with pytest.raises(PermissionError, match=r"HTTP 202.*Download it with a browser"):
            ham(tmp_path / "raw", server)
        server.fault = lambda name, number: ""
        ham(tmp_path / "raw", server)
        assert server.sent[PART] == (published / PART).stat().st_size
    assert_complete(tmp_path / "raw", published)


def test_a_disk_without_room_is_named_before_anything_comes(published, tmp_path):
    with publishing(published) as server:
        for entry in server.listing:
            entry["dataFile"]["filesize"] = 10**15
        with pytest.raises(OSError, match=r"raw needs 3000000\.00 GB more, and .* GB are free there"):
            ham(tmp_path / "raw", server)
        assert not server.requests


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "C:/x.jpg", "..\\x.jpg", "./x.jpg", "a\0.jpg", "link"]
)
def test_an_archive_that_leads_out_of_its_folder_is_not_unpacked(published, tmp_path, name):
    with zipfile.ZipFile(published / PART, "w") as archive:
        member = zipfile.ZipInfo("0.jpg")
        archive.writestr(member, b"good")
        member = zipfile.ZipInfo("link" if name == "link" else "x" * len(name))
        member.external_attr = (0o120777 if name == "link" else 0o100644) << 16
        archive.writestr(member, b"/etc/passwd")
    if name != "link":  # zipfile writes no such names: as another program would
        data = (published / PART).read_bytes()
        (published / PART).write_bytes(data.replace(b"x" * len(name), name.encode()))
    with publishing(published) as server, pytest.raises(ValueError, match="Nothing was unpacked"):
        ham(tmp_path / "raw", server)
    shutil.rmtree(published)
    assert set(contents(tmp_path)) == {f"raw/{PART}"}


def test_a_damaged_archive_is_named(published, tmp_path):
    data = bytearray((published / PART).read_bytes())
    data[10_000] ^= 1
    (published / PART).write_bytes(data)
    with publishing(published) as server, pytest.raises(ValueError, match=rf"{PART} is damaged .Bad CRC-32.*Delete it"):
        ham(tmp_path / "raw", server)
    assert set(contents(tmp_path / "raw")) == {PART}


def test_images_that_are_gone_or_changed_come_again_and_other_files_stay(published, tmp_path, capsys):
    raw = tmp_path / "raw"
    with publishing(published) as server:
        ham(raw, server)
        (raw / PARTS[0] / "10.jpg").unlink()
        (raw / PARTS[0] / "mine.txt").write_text("mine")
        assert ham(raw, server) == (1, 7)
        assert (raw / PARTS[0] / "mine.txt").read_text() == "mine"
        (raw / PARTS[0] / "mine.txt").unlink()
        assert_complete(raw, published)
        (raw / TABLE).write_bytes(b"L" + (raw / TABLE).read_bytes()[1:])
        assert ham(raw, server) == (0, 7)
        assert ham(raw, server, verify=True) == (1, 7)
        assert (raw / f"{TABLE}.changed").read_bytes().startswith(b"Lesion")
        (raw / TABLE).write_bytes(b"M" + (raw / TABLE).read_bytes()[1:])
        assert ham(raw, server, verify=True) == (1, 7)
        assert (raw / f"{TABLE}.changed").read_bytes().startswith(b"Lesion")
        assert (raw / f"{TABLE}.changed-2").read_bytes().startswith(b"Mesion")


@pytest.mark.parametrize("name", ["../mine.zip", "sub/mine.zip", "mine.zip"])
def test_a_record_of_what_came_removes_nothing_that_did_not(published, tmp_path, name):
    raw = tmp_path / "raw"
    with publishing(published) as server:
        ham(raw, server)
        (raw / "sub").mkdir()
        (raw / name).write_text("mine")
        record = json.loads((raw / "fetched.json").read_bytes())
        record["downloads"][name] = record["downloads"][PART] | {"is_kept": False, "files": {}}
        (raw / "fetched.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"fetched\.json is damaged"):
            ham(raw, server)
        assert (raw / name).read_text() == "mine"


@pytest.mark.parametrize("kind", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_of_any_compression_is_named(tmp_path, kind):
    content = np.random.default_rng(0).integers(0, 9, 3000, np.uint8).tobytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w", kind) as archive:
        archive.writestr("x.bin", content)
    whole = (tmp_path / "a.zip").read_bytes()
    for place in range(60, 400, 7):
        (tmp_path / "a.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.zip is damaged"):
            unpack(tmp_path / "a.zip", tmp_path / "a", False, lambda n: None)
        assert not (tmp_path / "a").exists()


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path, capsys):
    (tmp_path / "raw").write_text("")
    assert run("fetch", "ham10000", tmp_path / "raw") == 1
    assert "cannot be made" in capsys.readouterr().err


def test_a_folder_that_somebody_else_made_is_not_touched(published, tmp_path):
    raw = tmp_path / "raw"
    (raw / PARTS[1]).mkdir(parents=True)
    with publishing(published) as server:
        with pytest.raises(FileExistsError, match="was not fetched"):
            ham(raw, server)
        assert not server.requests
        shutil.copy(published / f"{PARTS[1]}.zip", raw)  # downloaded with a browser
        (raw / PARTS[1] / "20.jpg").write_bytes(b"another")
        with pytest.raises(FileExistsError, match=r"20\.jpg is another file"):
            ham(raw, server)
        (raw / PARTS[1] / "20.jpg").unlink()
        ham(raw, server)
        assert server.sent[f"{PARTS[1]}.zip"] == 0
    assert_complete(raw, published)


def test_archives_are_kept_when_asked(published, tmp_path):
    with publishing(published) as server:
        ham(tmp_path / "raw", server, keep=True)
        assert (tmp_path / "raw" / PART).read_bytes() == (published / PART).read_bytes()
        assert ham(tmp_path / "raw", server) == (0, 7)


@pytest.mark.parametrize(
    "url", ["https://user:word@host", "https://host?key=word", "ftp://host", "host", "https://host/a b"]
)
def test_a_server_is_a_url_without_credentials(url):
    with pytest.raises(ValueError, match="--server") as error:
        check_server(url)
    assert "word" not in str(error.value)


def test_nothing_leads_from_https_to_http():
    request = web_module.urllib.request.Request("https://host/a")
    for target in ("http://host/a", "file:///etc/passwd", "ftp://host/a"):
        with pytest.raises(PermissionError, match="not HTTPS"):
            web_module._SafeRedirects().redirect_request(request, None, 302, "", {}, target)
    assert web_module._SafeRedirects().redirect_request(request, None, 302, "", {}, "https://other/a")


def test_a_process_killed_in_a_download_goes_on_from_there(published, tmp_path):
    raw = tmp_path / "raw"
    with publishing(published, lambda name, number: "stall" if number == 1 and name == PART else "") as server:
        words = [sys.executable, "-m", "shards", "fetch", "ham10000", str(raw), "--server", server.url]
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        half = -(-(published / PART).stat().st_size // 2)
        deadline = time.monotonic() + 30
        while not (raw / f"{PART}.part").is_file() or (raw / f"{PART}.part").stat().st_size < half // 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=30)
        assert (second.returncode, "Another process is fetching" in second.stderr) == (1, True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = (raw / f"{PART}.part").stat().st_size
        assert run("fetch", "ham10000", raw, "--server", server.url) == 0
        assert server.sent[PART] == half + (published / PART).stat().st_size - there
    assert_complete(raw, published)


KILLED = """
import os, sys
import tqdm, shards.cli, shards.fetch.web
shards.fetch.web.PAUSE_S = 0.001
base, server = sys.argv[1:]
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open", "shutil.rmtree")

def call(folder, end):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and base in str(arguments[0]) and (event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            seen += 1
            if seen == end:
                os._exit(9)
    sys.addaudithook(hook)
    os._exit(shards.cli.main(["fetch", "ham10000", folder, "--server", server, "--patience", "5"]))

number = 1
while (code := call(f"{base}/{number}", number)) == 9:
    assert call(f"{base}/{number}", 0) == 0, number
    number += 1
print("places", code, number - 1)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_operation_on_files_continues(published, tmp_path):
    base = tmp_path / "killed"
    base.mkdir()
    with publishing(published, lambda name, number: "drop" if number % 2 else "") as server:
        words = [sys.executable, "-c", KILLED, str(base), server.url]
        done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    _, code, places = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert int(places) > 30
    for n in range(1, int(places) + 1):
        assert_complete(base / str(n), published)
