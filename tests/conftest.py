"""What the tests share: drawn lesions, packed small; settings of a tiny run; processes of a real one."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from harness.config import Config, load_config, read_config
from shards import demo
from shards.ham10000 import read_ham10000
from shards.index import Dataset, load
from shards.pack import Packing, pack
from shards.split import split_by_lesion
from support.processes import launch

TINY = """
data: {path: DATA, image_size: 32, global_batch_size: 12, threads: 2}
augment: {crop_side: [0.8, 1.0]}
model: {name: shufflenet_v2_x0_5, weights: none}
optim: {lr: 1.0e-3, warmup_epochs: 0.5}
run: {folder: RUN, epochs: 3, precision: fp32, sync_every: 2}
eval: {views: flips, batch_size: 8, positive_classes: [mel, mel+bcc+akiec], subgroups: [sex, age, localization, dx_type]}
"""


settings.register_profile("shared machine", deadline=None)  # a timing is no assertion
settings.load_profile("shared machine")


def pytest_configure(config) -> None:
    """All tests but `pytest -m gpu` run on the CPU, also where there is a GPU: many of them start several processes.

    Ctrl-C counts in those processes, also where a shell started the tests in the background and has it ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("-m") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """84 drawn lesions in HAM10000's layout."""
    folder = tmp_path_factory.mktemp("source") / "HAM10000"
    demo.draw(folder, images=84, seed=3)
    return folder


@pytest.fixture(scope="session")
def packed(source, tmp_path_factory) -> Path:
    """The same, packed at 48x36 into shards of 10."""
    out = tmp_path_factory.mktemp("packed") / "data"
    catalogue = read_ham10000(source)
    pack(catalogue, split_by_lesion(catalogue.images), out, Packing(size=(48, 36), shard_samples=10), quiet=True)
    return out


@pytest.fixture(scope="session")
def dataset(packed) -> Dataset:
    return load(packed)


@pytest.fixture
def tiny(packed, tmp_path) -> Path:
    """A config file of a run that takes seconds; its run folder is tmp_path/run."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("DATA", str(packed)).replace("RUN", str(tmp_path / "run")))
    return path


@pytest.fixture
def tiny_config(tiny) -> Config:
    return read_config(["--config", str(tiny)], tiny)


@pytest.fixture(scope="session")
def finished_run(packed, tmp_path_factory) -> Path:
    """The folder of a tiny run that went undisturbed on one process."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY.replace("DATA", str(packed)).replace("RUN", str(folder / "run")))
    done = launch("train", "--config", folder / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert load_config(folder / "run" / "config.yaml").run.epochs == 3
    return folder / "run"
