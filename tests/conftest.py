"""What the tests share: drawn lesions, packed small; settings of a tiny run; processes of a real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config import Config, load_config, read_config
from shards import demo
from shards.catalogue import read_ham10000
from shards.index import Dataset, load
from shards.pack import Packing, pack
from shards.split import lesion

ROOT = Path(__file__).parents[1]
TINY = """
data: {path: DATA, image_size: 32, batch_size: 12, threads: 2}
augment: {scale: [0.8, 1.0]}
model: {name: shufflenet_v2_x0_5, weights: none}
optim: {lr: 1.0e-3, warmup_epochs: 0.5}
run: {folder: RUN, epochs: 3, precision: fp32, log_every: 2}
eval: {views: flips, unit: 8}
"""


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
    pack(catalogue, lesion(catalogue.images), out, Packing(size=(48, 36), shard_samples=10), quiet=True)
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


def command(entry: str, *arguments, ranks: int = 1) -> list[str]:
    """The command line of launch/ENTRY.py on one process or several."""
    words = [str(ROOT / "launch" / f"{entry}.py"), *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]


def environment() -> dict[str, str]:
    """Ours, without what a launcher around the tests may have set."""
    drop = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "ACCELERATE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)}


def launch(entry: str, *arguments, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run launch/ENTRY.py to its end."""
    words = command(entry, *arguments, ranks=ranks)
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=ROOT)
