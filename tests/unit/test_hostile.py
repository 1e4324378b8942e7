"""Files of others, however wrong, end in a sentence that names them: nothing else is raised, run, opened or drawn.

Each file of a packed dataset and of a run is changed at random, also with the checksums above it made right again, and
given to all that reads it.
"""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.config import Config, load_config
from harness.evaluation.evaluate import priors_of_run
from harness.evaluation.results import read_predictions, read_results
from harness.model.build import build_model
from harness.report.page import draw_report
from harness.run import checkpoint, lock, recovery
from harness.run.folder import check_folder
from harness.run.log import Log
from harness.run.state import changes, is_finished
from harness.run.writer import CheckpointWriter
from shards.contact_sheet import first_of_class
from shards.groups import load_groups
from shards.index import Dataset, load, verify
from shards.leaks import refuse_leak
from shards.reader import SplitReader
from support.processes import peak_memory

TAG = "<script>alert('x')</script>"
DEEP = json.loads("[" * 400 + "]" * 400)
VALUES = [
    *(0, -1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), True, None, "", "a", " ", TAG, "0"),
    *(
        "../x",
        "/etc/passwd",
        "a/b",
        "..",
        "\0\7\x1b[2J",
        "\ud800",
        "ä\n\n",
        "x" * 5000,
        [],
        {},
        [1],
        {"a": 1},
        ["a"],
        [[]],
        DEEP,
    ),
]
RUBBISH = [
    b"",
    b"\0" * 64,
    b"\xff\xfe\xff",
    b"{",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    bytes(range(256)),
    b"null\n",
    b"[]",
]


class Hung(BaseException):
    """A reader did not come back."""


@dataclass(frozen=True)
class Place:
    """A folder whose files are changed, and its readers."""

    folder: Path
    files: list[Path]
    pristine: dict[Path, bytes]

    def put_back(self) -> None:
        for path in [path for path in self.folder.rglob("*") if path.is_file() and path not in self.pristine]:
            path.unlink()
        for path, data in self.pristine.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)


def place(folder: Path) -> Place:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    return Place(folder, files, {path: path.read_bytes() for path in files})


@pytest.fixture(scope="module")
def data(packed, tmp_path_factory) -> Place:
    return place(shutil.copytree(packed, tmp_path_factory.mktemp("hostile") / "data"))


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory) -> Place:
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("hostile") / "run")
    (folder / "changes.json").write_text('["optim.lr: 1 is now 2"]')
    (folder / "id").write_text("0123456789abcdef")
    held = {
        "host": os.uname().nodename,
        "namespace": lock._process_namespace(),
        "process": 1,
        "started": 0.0,
        "beats": 1,
    }
    (folder / "lock.json").write_text(json.dumps(held))
    return place(folder)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_model("shufflenet_v2_x0_5", 7)


def changed_json(content, draw: random.Random):
    """The value with something else somewhere in it."""
    if isinstance(content, dict | list) and content and draw.random() < 0.9:
        key = draw.choice(list(content) if isinstance(content, dict) else range(len(content)))
        what = draw.random()
        if what < 0.12:
            del content[key]
        elif what < 0.24 and isinstance(content, dict):
            content[str(draw.choice(VALUES))[:50]] = content[key]
        else:
            content[key] = changed_json(content[key], draw)
        return content
    return draw.choice(VALUES)


def changed(path: Path, data: bytes, draw: random.Random) -> bytes:
    """The bytes of a file, changed as its kind allows, or anyhow."""
    if draw.random() < 0.7:
        with suppress(UnicodeDecodeError, UnicodeEncodeError, RecursionError):
            if path.suffix in (".json", ".jsonl"):
                lines = [data.decode()] if path.suffix == ".json" else data.decode().splitlines()
                number = draw.randrange(len(lines))
                lines[number] = json.dumps(changed_json(json.loads(lines[number]), draw), indent=None)
                return "\n".join(lines).encode("utf-8", "surrogatepass")
            if path.suffix == ".yaml":
                return yaml.safe_dump(changed_json(yaml.safe_load(data), draw)).encode()
            if path.suffix == ".csv":
                cells = [line.split(",") for line in data.decode().splitlines()]
                line = cells[draw.choice([0, draw.randrange(len(cells))])]
                line[draw.randrange(len(line))] = str(draw.choice(VALUES))
                return "\n".join(map(",".join, cells)).encode()
    what, spot = draw.random(), draw.randrange(max(1, len(data)))
    if what < 0.2:
        return draw.choice(RUBBISH)
    if what < 0.4:
        return data[:spot]
    if what < 0.6:
        return data[:spot] + str(draw.choice(VALUES)).encode("utf-8", "replace") + data[spot + draw.randrange(9) :]
    flipped = bytearray(data)
    for _ in range(draw.choice([1, 3, 100])):
        flipped[draw.randrange(min(len(data), draw.choice([200, 10**9])))] = draw.randrange(256)
    return bytes(flipped)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sign(folder: Path, changed_file: Path) -> None:
    """Make all checksums right again, as far as the files can still be read."""
    if (folder / "shards.csv").is_file():
        sign_dataset(folder, changed_file)
    elif (manifest := changed_file.with_name("manifest.json")).is_file() and changed_file != manifest:
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(content | {changed_file.name: digest(changed_file)}))


def sign_dataset(folder: Path, changed_file: Path) -> None:
    with suppress(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        if changed_file.suffix in (".tar", ".csv") and changed_file.name not in ("shards.csv", "left_out.csv"):
            lines = [line.split(",") for line in (folder / "shards.csv").read_text().splitlines()]
            for line in lines[1:]:
                if Path(line[0]).stem == changed_file.stem:
                    line[3:] = [
                        str((folder / line[0]).stat().st_size), digest(folder / line[0]), digest((folder / line[0]).with_suffix(".csv"))
                    ]  # fmt: skip
            (folder / "shards.csv").write_text("\n".join(map(",".join, lines)) + "\n")
        content = json.loads((folder / "dataset.json").read_bytes())
        for name in content["files"]:
            if (folder / name).is_file():
                content["files"][name] = digest(folder / name)
        content.pop("checksum", None)
        checksum = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
        text = json.dumps(content | {"checksum": checksum}, indent=1, ensure_ascii=False) + "\n"
        (folder / "dataset.json").write_bytes(text.encode())


@contextmanager
def only_sentences(folder: Path):
    """Inside, success, or a ValueError or OSError that names a file; within seconds."""

    def hung(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(30)
    text = None
    try:
        yield
    except (ValueError, OSError) as error:
        text = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert text is None or (str(folder) in text and len(text) < 2000), f"names no file, or is long: {text[:300]}"


def read_dataset(folder: Path) -> None:
    """All that reads a packed dataset."""
    with only_sentences(folder):
        assert all(str(folder) in problem for problem in verify(folder))
    with only_sentences(folder):
        dataset = load(folder)
        dataset.describe_split()
        for split in [*dataset.description.counts, *dataset.description.aliases]:
            with only_sentences(folder):
                load_groups(dataset, split)
            reader = opened(dataset, split)
            for shard in range(len(reader.shards)) if reader else ():
                with only_sentences(folder):
                    decode_all(reader, shard)
        with only_sentences(folder):
            refuse_leak(dataset)
        with only_sentences(folder):
            first_of_class(dataset, next(iter(dataset.description.counts)), 0, 2)


def opened(dataset: Dataset, split: str) -> SplitReader | None:
    with only_sentences(dataset.folder):
        return SplitReader(dataset, split)
    return None


def decode_all(reader: SplitReader, shard: int) -> None:
    """Each sample by itself, as bad ones do not keep others from being read."""
    rows = np.arange(reader.shard_sizes[shard])
    out = np.empty((reader.dataset.height, reader.dataset.width, 3), np.uint8)
    for row, jpeg in reader.read(np.full(len(rows), shard), rows):
        with only_sentences(reader.dataset.folder):
            reader.decode(shard, row, jpeg, out)


def read_run(folder: Path, model: torch.nn.Module, dataset: Dataset, config: Config, local: Path) -> None:
    """All that reads a run, but its report."""
    with only_sentences(folder):
        check_folder(folder, config, dataset)
    for reader in (
        lambda path: load_config(path / "config.yaml"),
        changes,
        is_finished,
        read_results,
        read_predictions,
        priors_of_run,
    ):
        with only_sentences(folder):
            reader(folder)
    with only_sentences(folder):
        found = recovery.latest_valid(folder)
        checkpoint.restore(found, model, torch.optim.AdamW(model.parameters()), None)
    with only_sentences(folder):
        checkpoint.load_model(recovery.find_best(folder), model)
    with only_sentences(folder), lock.RunLock(folder) as held:
        held.acquire()
    with only_sentences(folder), Log() as log:
        log.start(folder, 2, writes=True, board=False)
    with only_sentences(folder), CheckpointWriter(folder, str(local)) as writer:
        writer.sync_on_start()
        assert writer.directory().parent == local
    shutil.rmtree(local, ignore_errors=True)


def examples(few: int, many: int):
    """Few in each run of the tests, many with `-m slow`."""
    # A failure is a seed, and a smaller seed is no simpler failure.
    shared = {
        "phases": [Phase.generate],
        "deadline": None,
        "suppress_health_check": [HealthCheck.function_scoped_fixture],
        "derandomize": True,
    }
    return [
        pytest.param(settings(max_examples=few, **shared), id="few"),
        pytest.param(settings(max_examples=many, **shared), id="many", marks=pytest.mark.slow),
    ]


def attack(place: Place, files: list[Path], count: settings, readers) -> None:
    """Change one of the files after another, in `count` ways, with and without right checksums."""

    @count
    @given(seed=st.integers(0, 2**62), signs=st.booleans(), number=st.integers(0, len(files) - 1))
    def attacked(seed: int, signs: bool, number: int) -> None:
        path = files[number]
        try:
            path.write_bytes(changed(path, place.pristine[path], random.Random(seed)))
            if signs:
                sign(place.folder, path)
            readers(place.folder)
        finally:
            place.put_back()

    attacked()


@pytest.mark.parametrize("count", examples(30, 700))
def test_a_dataset_of_others_is_read_or_refused_with_a_sentence(data, count):
    index = [path for path in data.files if path.suffix in (".json", ".npy") or path.name == "shards.csv"]
    tables = [path for path in data.files if path.name.startswith(("train", "val", "test")) and path not in index]
    attack(data, [*index, *index, *tables], count, read_dataset)


@pytest.mark.parametrize("count", examples(20, 300))
def test_a_run_of_others_is_read_or_refused_with_a_sentence(run, model, dataset, monkeypatch, tmp_path, count):
    monkeypatch.setattr(lock, "WATCHED_S", 0.02)
    config = load_config(run.folder / "config.yaml")
    files = [path for path in run.files if path.suffix not in (".jpg", ".html", ".png", ".gz")]
    attack(run, files, count, lambda folder: read_run(folder, model, dataset, config, tmp_path / "local"))


@pytest.mark.parametrize("count", examples(3, 70))
def test_a_report_of_the_files_of_others_is_drawn_or_refused_and_shows_no_tag_of_theirs(run, count):
    names = ("metrics.json", "predictions.csv", "log.jsonl", "starts.jsonl", "state.json", "config.yaml")

    def read(folder: Path) -> None:
        (folder / "report.html").unlink()
        with only_sentences(folder):
            draw_report(folder)
            assert "<script" not in (folder / "report.html").read_text(encoding="utf-8")

    attack(run, [run.folder / name for name in names], count, read)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"checksum": 5}', "[1]", "3", '{"checksum": ["a"]}'])
def test_a_damaged_description_in_a_run_folder_tells_nothing(run, dataset, text):
    try:
        (run.folder / "dataset.json").write_text(text)
        assert check_folder(run.folder, load_config(run.folder / "config.yaml"), dataset) == []
    finally:
        run.put_back()


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/b.tar", "..", "x.tar\n", ".hidden.tar", "passwd"])
def test_a_shard_of_a_dataset_lies_in_its_folder(data, name):
    text = (data.folder / "shards.csv").read_text()
    first = text.splitlines()[1].partition(",")[0]
    try:
        (data.folder / "shards.csv").write_text(text.replace(first, json.dumps(name).replace("\\n", "\n")))
        sign(data.folder, data.folder / "shards.csv")
        with pytest.raises(ValueError, match=r"shards\.csv names .* is not the plain name of a \.tar file"):
            load(data.folder)
    finally:
        data.put_back()


def test_an_index_file_of_a_dataset_lies_in_its_folder(data):
    try:
        content = json.loads((data.folder / "dataset.json").read_text())
        content["files"]["../../secret"] = "0" * 64
        (data.folder / "dataset.json").write_text(json.dumps(content))
        sign(data.folder, data.folder / "dataset.json")
        with pytest.raises(ValueError, match=r"dataset\.json names '\.\./\.\./secret', which is not a plain file name"):
            load(data.folder)
    finally:
        data.put_back()


@pytest.mark.parametrize("found", ["../other", "/tmp", "0123456789ABCDEF", "", "0123456789abcdef\n", "\ud800"])
def test_copies_of_checkpoints_never_land_in_the_folder_of_another(tmp_path, found):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "id").write_bytes(found.encode("utf-8", "surrogatepass"))
    with CheckpointWriter(tmp_path / "run", str(tmp_path / "local")) as writer:
        assert writer.directory().parent == tmp_path / "local"
        assert writer.directory() == writer.directory()
        assert len(writer.directory().name) == 16


def samples_that_are_none() -> dict[str, bytes]:
    pixels, files = np.zeros((600, 800, 3), np.uint8), {}
    for kind in ("JPEG", "PNG", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        files |= {
            f"large {kind}": buffer.getvalue(),
            f"half of {kind}": buffer.getvalue()[: len(buffer.getvalue()) // 2],
        }
    return files | {
        "nothing": b"",
        "no image": b"\0" * 100,
        "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 36\n",
    }


@pytest.mark.parametrize(("kind", "sample"), samples_that_are_none().items())
def test_a_sample_that_cannot_be_decoded_is_named_with_its_shard_and_place(dataset, kind, sample):
    reader = SplitReader(dataset, "train")
    out = np.empty((dataset.height, dataset.width, 3), np.uint8)
    key, offset = reader.table(0).key[3], reader.table(0).offset[3]
    with pytest.raises(ValueError, match=rf"sample {key:08d} of .*\.tar \(byte {offset}\)"):
        reader.decode(0, 3, sample, out)


def test_an_image_of_other_size_takes_no_memory_before_it_is_refused(tmp_path):
    with open(tmp_path / "bomb.png", "wb") as file:
        Image.new("1", (13_000, 13_000)).save(file)  # 169 million pixels: Pillow warns, and takes 0.7 GB
    code = """
import pathlib, sys
import numpy as np
from shards.image import decode_into
try:
    decode_into(pathlib.Path(sys.argv[1]).read_bytes(), np.empty((36, 48, 3), np.uint8))
except ValueError as error:
    assert "13000x13000" in str(error)
"""
    assert peak_memory(code, tmp_path / "bomb.png") < 150


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "data: !!python/object/apply:os.system ['touch RAN']",
        "data: {path: !!python/object/apply:os.system ['touch RAN']}",
        "[" * 5000,
        f"{LAUGHS}data: {{path: *i}}",
        "data: {path: [[a]]}",
        "data: {path: [a, b]}",
        "data: {image_size: true}",
        "data: 3",
        "3",
        "",
        "data: {path: 2001-99-99}",
    ],
)
def test_settings_run_nothing_and_end_in_a_sentence(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged, or of another version") as found:
        load_config(tmp_path / "config.yaml")
    assert len(str(found.value)) < 1000
    assert not (tmp_path / "RAN").exists()


class Payload:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch RAN",)


def test_no_pickle_of_a_checkpoint_is_run(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = recovery.latest_valid(run.folder)
    try:
        for dump in (lambda path: path.write_bytes(pickle.dumps(Payload())), lambda path: torch.save(Payload(), path)):
            dump(found.folder / "optimizer.pt")
            sign(run.folder, found.folder / "optimizer.pt")
            with pytest.raises(ValueError, match=r"optimizer\.pt cannot be loaded"):
                checkpoint.restore(
                    recovery.latest_valid(run.folder), model, torch.optim.AdamW(model.parameters()), None
                )
    finally:
        run.put_back()
    assert not (tmp_path / "RAN").exists()
