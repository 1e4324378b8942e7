"""Sources behind a URL give what their folders give, with one listing and one request an image; what cannot be read is an error, never left out."""

import shutil
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from shards import cli
from shards import storage as storage_module
from shards.folders import ImageFinder, walk
from shards.outputs import Packing
from shards.pack import pack_several
from shards.public_data import Columns
from shards.records import identity
from shards.remote import Access
from shards.sources import read_source
from shards.split import split_by_lesion
from shards.storage import Storage
from shards.tasks import Task, cut, share
from shards.tree import RemotePath, Tree, open_source
from support.packing import draw_kinds, draw_source, pack_task


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def put(files, folder: Path, name: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"memory://{name}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def kinds(source, tmp_path_factory) -> dict[str, list[str]]:
    """Words of the command line of each kind of source, with ROOT where its folder stands."""
    return draw_kinds(source, tmp_path_factory.mktemp("kinds") / "root")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    draw_source(folder := tmp_path_factory.mktemp("whole") / "source")
    return folder


@pytest.mark.parametrize(
    "kind", ["ham10000", "table of ham10000", "classes", "splits", "groups", "image root", "companion", "isic2018"]
)
def test_a_source_behind_a_url_is_packed_to_the_bytes_of_its_folder(kinds, memory, tmp_path, kind, capsys):
    root, words = kinds["root"][0], kinds[kind]
    url, said = put(memory, Path(root), "bucket/root"), []
    for place, out in ((root, "folder"), (url, "url")):
        there = [word.replace("ROOT", place) for word in words]
        assert (
            cli.main(["pack", there[0], str(tmp_path / out), *there[1:], "--size", "12x9", "--shard-samples", "9"]) == 0
        )
        said.append(capsys.readouterr().out.replace(place, "ROOT").partition("\n")[0])
    assert said[0] == said[1]
    assert contents(tmp_path / "url") == contents(tmp_path / "folder")


def test_tasks_may_read_one_source_from_its_folder_and_from_a_url(whole, memory, tmp_path):
    url = put(memory, whole, "bucket/source")
    pack_task(whole, [tmp_path / "alone"])
    for rank, place in enumerate((url, whole, url)):
        pack_task(place, ["memory://bucket/out"], rank, 3)
    assert {name: memory.cat_file(f"/bucket/out/{name}") for name in contents(tmp_path / "alone")} == contents(
        tmp_path / "alone"
    )
    one, other = (read_source(place, Columns()) for place in (whole, url))
    assert identity(one, split_by_lesion(one.images), {}) == identity(other, split_by_lesion(other.images), {})


def test_a_task_lists_once_and_reads_the_images_of_its_own_shards_once(whole, memory, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "source")
    rows = [
        (path.relative_to(folder).as_posix(), path.parent.name, path.stem) for path in sorted(folder.rglob("*.png"))
    ]
    pd.DataFrame(rows, columns=["image", "dx", "lesion"]).to_csv(folder / "table.csv", index=False)
    url, asked = put(memory, folder, "bucket/source"), Counter()
    for method in ("find", "ls", "info", "cat_file", "open", "exists", "isfile", "isdir"):
        plain = getattr(MemoryFileSystem, method)

        def counted(self, path, *words, _method=method, _plain=plain, **options):
            asked[_method if _method != "cat_file" else path] += 1
            return _plain(self, path, *words, **options)

        monkeypatch.setattr(MemoryFileSystem, method, counted)
    columns = Columns("image", ("dx",), ("lesion",))
    source = read_source(f"{url}/table.csv", columns)
    listed = {name: asked.pop(name, 0) for name in ("find", "ls", "info", "exists", "isfile", "isdir")}
    assert listed["find"] <= 2
    assert sum(listed.values()) < 20  # of 84 images: none is asked for by itself
    assert {name for name in asked if name.startswith("/")} == {"/bucket/source/table.csv"}
    asked.clear()
    split, task = split_by_lesion(source.images), Task(1, 3)
    pack_several(source, split, [(tmp_path / "out", Packing((16, 12), shard_samples=10))], 2, True, task=task)
    own = {str(path.at) for one in share(cut(split, 10), task) for path in source.images["path"].iloc[one.rows]}
    assert {name: times for name, times in asked.items() if name.startswith("/")} == {
        f"/bucket/source/{at}": 1 for at in own
    }
    assert asked["find"] + asked["ls"] + asked["info"] == 0


NAMES = (
    "a/b.png",
    "a b/c.png",
    "a-b/c.png",
    "A/x.PNG",
    "a/.hidden.png",
    ".git/x.png",
    "ü/ß.jpg",
    "z.txt",
    "a/b/c/d.tif",
    "q?x=1#y/[1]*.png",
)


def test_paths_of_a_url_say_what_those_of_a_folder_say(memory, tmp_path):
    for name in NAMES:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(name.encode())
    remote = open_source(put(memory, tmp_path / "root", "bucket/some/root"))
    memory.pipe_file("/bucket/some/root2/no.png", b"1")
    memory.pipe_file("/bucket/some/beside/x.png", b"22")
    local = tmp_path / "root"
    assert [path.relative_to(remote).as_posix() for path in walk(remote)] == [
        path.relative_to(local).as_posix() for path in walk(local)
    ]
    for one, other in zip(walk(remote), walk(local), strict=True):
        assert (one.name, one.stem, one.suffix, one.parent.name) == (
            other.name,
            other.stem,
            other.suffix,
            other.parent.name,
        )
        assert one.read_bytes() == other.read_bytes()
    for name in (*NAMES, "a", "none", "a/../a/b.png", "./a/b.png", "a/none.png", "/a/b.png", "a/b", "", "..", "q"):
        one, other = remote / name, local / name
        assert (one.is_file(), one.is_dir()) == (other.is_file(), other.is_dir()), name
    assert (remote / "../beside/x.png").read_bytes() == b"22"
    assert str(remote / "a/../../beside/x.png") == "memory://bucket/some/beside/x.png"
    assert (remote / "../../../../bucket").is_dir() is False  # above the bucket there is nothing
    assert [path.name for path in remote.parent.iterdir()] == ["beside", "root", "root2"]
    with pytest.raises(TypeError):
        Path(remote)


def test_an_image_of_a_url_is_found_as_in_a_folder(memory):
    for name in ("train/ISIC_0000001.jpg", "train/ISIC_0000002_downsampled.JPG", "more/deep/0034567.png", "more/x.tif"):
        memory.pipe_file(f"/bucket/images/{name}", b"1")
    finder = ImageFinder(open_source("memory://bucket/images"))
    for name, file in {
        "ISIC_0000001": "train/ISIC_0000001.jpg",
        "train\\ISIC_0000001": "train/ISIC_0000001.jpg",
        "ISIC_0000002.jpg": "train/ISIC_0000002_downsampled.JPG",
        "34567": "more/deep/0034567.png",
        "s3://elsewhere/x.tif": "more/x.tif",
        "y": None,
    }.items():
        assert finder.find(name) == (finder.root / file if file else None)


def test_copies_of_one_image_stay_together_and_with_one_label(whole, memory, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "source")
    shutil.copy(folder / "n" / "00.png", folder / "n" / "copy.png")
    url = put(memory, folder, "bucket/source")
    for place in (folder, url):
        images = read_source(place, Columns()).images.set_index("image_id")
        assert images.loc["n/copy", "group"] == "n/00"
    memory.pipe_file("/bucket/source/m/again.png", (folder / "n" / "00.png").read_bytes())
    with pytest.raises(
        ValueError,
        match=r"memory://bucket/source/m/again.png and memory://bucket/source/n/00.png are the same file under two",
    ):
        read_source(url, Columns())


def packing(source, out, bad: str = "skip", task: Task | None = None):
    split = split_by_lesion(source.images)
    return pack_several(source, split, [(out, Packing((16, 12), shard_samples=10))], 2, True, bad, task or Task())


@pytest.mark.parametrize("bad", ["fail", "skip"])
@pytest.mark.parametrize("fault", ["gone", "cut off", "grown", "away", "denied"])
def test_an_image_that_storage_does_not_give_is_an_error_and_is_never_left_out(
    whole, memory, tmp_path, monkeypatch, fault, bad
):
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.02)
    source = read_source(open_source(put(memory, whole, "bucket/source"), 0.3), Columns())
    victim, data = "/bucket/source/m/46.png", memory.cat_file("/bucket/source/m/46.png")
    if fault == "gone":
        memory.rm(victim)
    elif fault in ("cut off", "grown"):
        memory.pipe_file(victim, data[:-20] if fault == "cut off" else data + b"0")
    else:
        plain, error = MemoryFileSystem.cat_file, OSError("reset") if fault == "away" else PermissionError("no")

        def failing(self, path, *words, **options):
            if path == victim:
                raise error
            return plain(self, path, *words, **options)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    said = {
        "gone": "m/46.png was there when the source was listed, and is gone",
        "cut off": f"m/46.png has {len(data) - 20} bytes, and had {len(data)} when the source was listed",
        "grown": f"m/46.png has {len(data) + 1} bytes, and had {len(data)}",
        "away": r"memory://bucket/source/m/46.png could not be read for 0.3 s \(OSError: reset",
        "denied": "memory://bucket/source/m/46.png may not be read",
    }
    began = time.monotonic()
    with pytest.raises(OSError, match=said[fault]):
        packing(source, tmp_path / "out", bad)
    assert time.monotonic() - began < 30
    assert not (tmp_path / "out").exists()


def test_one_process_goes_on_where_a_source_was_away(whole, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.02)
    pack_task(whole, [tmp_path / "alone"])
    source = read_source(open_source(put(memory, whole, "bucket/source"), 0.2), Columns())
    left, plain = [50], MemoryFileSystem.cat_file

    def failing(self, path, *words, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("reset")
        return plain(self, path, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", failing)
        with pytest.raises(ConnectionError, match="could not be read for"):
            packing(source, tmp_path / "out")
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.tar")}
    assert len(kept) >= 2
    packing(source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def test_an_original_replaced_between_two_starts_is_packed_again(whole, memory, tmp_path):
    url, out = put(memory, whole, "bucket/source"), tmp_path / "out"
    pack_task(url, [out], 0, 2)
    source = read_source(url, Columns())
    first = cut(split_by_lesion(source.images), 10)[0]
    victim = source.images["path"].iloc[first.rows[0]].at
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out.partial").glob("*.tar")}
    flipped = Image.fromarray(np.asarray(Image.open(whole / victim))[::-1].copy())
    flipped.save(tmp_path / "flipped.png")
    memory.pipe_file(f"/bucket/source/{victim}", (tmp_path / "flipped.png").read_bytes())
    for rank in (0, 1):
        pack_task(url, [out], rank, 2)
    assert {name for name, inode in before.items() if (out / name).stat().st_ino != inode} == {f"{first.name}.tar"}
    folder = shutil.copytree(whole, tmp_path / "source")
    shutil.copy(tmp_path / "flipped.png", folder / victim)
    pack_task(folder, [tmp_path / "alone"])
    assert contents(out) == contents(tmp_path / "alone")


def test_what_is_no_source_behind_a_url_is_refused_with_what_to_do(whole, memory, tmp_path, capsys):
    memory.pipe_file("/bucket/x.zip", b"PK")
    table, columns = tmp_path / "t.csv", ("--image-column", "image", "--label-column", "dx")
    table.write_text("image,dx\na,b\n")
    for words, said in {
        ("https://host/set",): "https://host/set: a web server does not list its files. Give a folder of a bucket",
        ("file:///tmp/set",): "file:///tmp/set is a folder of this machine. Give its path",
        ("simplecache::s3://b/set",): "is a chain of URLs. Give the last one alone",
        ("nothing://b/set",): "nothing://b/set cannot be opened",
        ("memory://bucket/none",): "The source memory://bucket/none is not a folder",
        ("memory://bucket/none.csv", *columns): "The file memory://bucket/none.csv does not exist",
        ("memory://bucket/x.zip", *columns): "memory://bucket/x.zip is an archive",
        (str(table), *columns, "--image-root", "http://host/i"): "http://host/i: a web server",
        (str(table), *columns, "--image-root", "memory://bucket/i"): "below memory://bucket/i",
    }.items():
        assert cli.main(["pack", words[0], str(tmp_path / "out"), *words[1:]]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["pack", str(whole), str(tmp_path / "out"), "--merge-duplicates", "s3://b/audit.csv"])
    assert "s3://b/audit.csv is a URL. Give a file of this machine" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_source_behind_a_url_is_not_audited_before_it_is_packed(kinds, memory, tmp_path):
    pytest.importorskip("faiss")
    from shards.audit.collection import open_collection

    root = Path(kinds["root"][0])
    url = put(memory, root, "bucket/root")
    with pytest.raises(FileNotFoundError, match=r"dataset.json is missing.*A source is packed before it is audited"):
        open_collection(url, Columns(), Access(cache_gb=0))
    with pytest.raises(ValueError, match=r"are behind a URL. Pack them, and audit the packed dataset's URL"):
        open_collection(root / "tables" / "table.csv", Columns("image", ("dx",), (), (), open_source(f"{url}/classes")))


def test_nothing_that_gives_access_is_written_or_said(whole, memory, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "source")
    (folder / "n" / "00.png").write_bytes(b"damaged")
    put(memory, folder, "user:hunter2@bucket/source")
    url = "memory://user:hunter2@bucket/source"
    words = ["pack", url, str(tmp_path / "out"), "--size", "16x12"]
    assert cli.main(words) == 1
    assert cli.main([*words, "--on-bad-image", "skip"]) == 0
    assert cli.main(["pack", f"{url}/none", str(tmp_path / "none")]) == 1
    said = capsys.readouterr()
    assert "memory://bucket/source/n/00.png" in said.err
    for data in (said.out.encode(), said.err.encode(), *contents(tmp_path / "out").values()):
        assert b"hunter2" not in data


def test_a_listing_that_takes_long_is_given_more_time_and_marks_of_folders_are_no_files(monkeypatch):
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.01)
    given = []

    def slow(self, method, *words, grace=0.0, **options):
        given.append(grace)
        if len(given) < 4:
            raise TimeoutError
        marks = [{"name": name, "size": 0, "type": "file"} for name in ("/bucket/source/", "/bucket/source/empty/")]
        return {each["name"]: each for each in [*marks, {"name": "/bucket/source/a.png", "size": 3, "type": "file"}]}

    monkeypatch.setattr(Storage, "call", slow)
    tree = Tree("memory://bucket/source", 100.0)
    tree.look_through()
    assert given == [0.0, 30.0, 90.0, 100.0]
    assert RemotePath(tree, "a.png").listed == (3, "")
    assert [path.at for path in RemotePath(tree).walk()] == ["a.png"]
    assert not RemotePath(tree).is_file()  # an empty file with a slash at its end stands for a folder
    assert (RemotePath(tree) / "empty").is_dir()


def test_a_file_comes_in_pieces_that_a_slow_line_carries_in_time(memory, monkeypatch):
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.01)
    memory.pipe_file("/bucket/source/a.tif", np.random.default_rng(0).bytes(10**6))
    plain, asked = MemoryFileSystem.cat_file, []

    def slow(self, path, start=None, end=None):
        asked.append(end - start)
        if end - start > 2**17:
            raise TimeoutError
        return plain(self, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", slow)
    assert (open_source("memory://bucket/source") / "a.tif").read_bytes() == plain(memory, "/bucket/source/a.tif")
    assert len(asked) < 20  # what came is not asked for again
