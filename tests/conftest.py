"""What the tests share: drawn lesions, packed small; settings of a tiny run; processes of a real one."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from threading import Timer

import pytest
import torch
from safetensors.torch import load_file

from harness.config import Config, load_config, read_config
from shards import demo
from shards.catalogue import read_ham10000
from shards.index import Dataset, load
from shards.pack import Packing, pack
from shards.split import lesion

ROOT = Path(__file__).parents[1]
SAVING = ("--run.log_every", "1", "--run.save_every_minutes", "0")  # a checkpoint after each step
TINY = """
data: {path: DATA, image_size: 32, batch_size: 12, threads: 2}
augment: {scale: [0.8, 1.0]}
model: {name: shufflenet_v2_x0_5, weights: none}
optim: {lr: 1.0e-3, warmup_epochs: 0.5}
run: {folder: RUN, epochs: 3, precision: fp32, log_every: 2}
eval: {views: flips, unit: 8}
"""


def pytest_configure(config) -> None:
    """All tests but `pytest -m gpu` run on the CPU, also where there is a GPU: many of them start several processes."""
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
    """The command line of launch/ENTRY.py (or of tests/driven.py) on one process or several."""
    folder = "tests" if entry == "driven" else "launch"
    words = [str(ROOT / folder / f"{entry}.py"), *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]


def environment(**more: str) -> dict[str, str]:
    """Ours, without what a launcher around the tests may have set."""
    drop = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "ACCELERATE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)} | more


def launch(
    entry: str, *arguments, ranks: int = 1, timeout: float = 120, disturb: str = ""
) -> subprocess.CompletedProcess:
    """Run launch/ENTRY.py, or tests/driven.py with its disturbances, to its end.

    Its processes are forked from the zygote, as under a plain `srun`: no launcher tidies up after one of them. The exit
    code is 0, or the first other one; the words are those of rank 0, then of rank 1, ...
    """
    words = command(entry, *arguments)[1:]
    shared = environment(DISTURB=disturb)
    if ranks == 1:
        return fork(words, [shared], timeout)
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    return fork(words, [shared | place for place in places], timeout)


@cache
def zygote() -> subprocess.Popen:
    """The process that our programs are forked from; it ends when the tests do."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(ROOT / "tests" / "zygote.py")], **pipes, env=environment(), cwd=ROOT)


def fork(words: list[str], environments: list[dict[str, str]], timeout: float) -> subprocess.CompletedProcess:
    """Run a Python program from the zygote, one process in each environment."""
    with tempfile.TemporaryDirectory() as folder:
        outs, errors = ([Path(folder, f"{kind}{n}") for n in range(len(environments))] for kind in ("out", "err"))
        files = {"outs": list(map(str, outs)), "errs": list(map(str, errors))}
        server = zygote()
        server.stdin.write(json.dumps({"words": words, "envs": environments, "cwd": str(ROOT)} | files) + "\n")
        server.stdin.flush()
        pids, late = list(map(int, server.stdout.readline().split())), []

        def end() -> None:
            late.append(True)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        timer = Timer(timeout, end)
        timer.start()
        codes = list(map(int, server.stdout.readline().split()))
        timer.cancel()
        out, error = ("".join(path.read_text() for path in paths) for paths in (outs, errors))
        if late:
            raise subprocess.TimeoutExpired(words, timeout, out, error)
        return subprocess.CompletedProcess(words, next((code for code in codes if code), 0), out, error)


def free_port() -> str:
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def start(words: list[str], **variables: str) -> subprocess.Popen:
    """Start a command in a session of its own, so that a signal reaches whom the test means."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, **pipes, env=environment(**variables), cwd=ROOT, start_new_session=True)


def state(run: Path) -> dict:
    """What a run folder's state.json says, empty before there is one."""
    return json.loads((run / "state.json").read_text()) if (run / "state.json").is_file() else {}


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until a run has saved that step."""
    deadline = time.monotonic() + 60
    while state(run).get("step", -1) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def weights(run: Path, kind: str = "step-") -> dict:
    """The newest weights of a run, of its steps or its best."""
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.startswith(kind))
    return load_file(newest / "model.safetensors")


def assert_equal_weights(one: dict, other: dict) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def deterministic_log(run: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "waited")} for line in lines]


def bare_ranks(config: Path, run: Path, disturb: str, *more, **variables: str) -> list[subprocess.Popen]:
    """Two ranks without a launcher that would tidy up after one of them, as under a plain `srun`."""
    words = command("driven", "--config", config, "--run.folder", run, *SAVING, *more)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [start(words, DISTURB=disturb, RANK=rank, LOCAL_RANK=rank, **shared, **variables) for rank in ("0", "1")]
