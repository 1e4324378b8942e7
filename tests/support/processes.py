"""Real processes of ours: started, watched, and what they left in a run folder."""

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

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
OF_THE_MACHINE = ("images_per_s", "waited", "rss_bytes", "peak_gpu_bytes", "mfu")
SAVING = ("--run.sync_every", "1", "--run.save_every_minutes", "0")  # a checkpoint after each step


def command(entry: str, *arguments, ranks: int = 1) -> list[str]:
    """The command line of launch/ENTRY.py (or of tests/support/driven.py) on one process or several."""
    program = {"driven": "tests/support/driven.py", "bench": "launch/bench/__main__.py"}.get(
        entry, f"launch/{entry}.py"
    )
    words = [str(ROOT / program), *map(str, arguments)]
    if ranks == 1:
        return [sys.executable, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]


def environment(**more: str) -> dict[str, str]:
    """Ours, without what a launcher around the tests may have set."""
    drop = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "ACCELERATE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)} | more


def peak_memory(code: str, *arguments) -> float:
    """Run Python code in a process of its own; the most memory that it held, in MB (of its own: not of who started it)."""
    code += '\nprint([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])'
    words = [sys.executable, "-c", code, *map(str, arguments)]
    shared = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    done = subprocess.run(words, cwd=ROOT, env=shared, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1024


def launch(
    entry: str, *arguments, ranks: int = 1, timeout: float = 120, disturb: str = "", folder: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run launch/ENTRY.py, or tests/support/driven.py with its disturbances, to its end, in a folder.

    Its processes are forked from the zygote, as under a plain `srun`: no launcher tidies up after one of them. The exit
    code is 0, or the first other one; the words are those of rank 0, then of rank 1, ...
    """
    words = command(entry, *arguments)[1:]
    shared = environment(DISTURB=disturb)
    if ranks == 1:
        return fork(words, [shared], timeout, folder)
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    return fork(words, [shared | place for place in places], timeout, folder)


@cache
def zygote() -> subprocess.Popen:
    """The process that our programs are forked from; it ends when the tests do."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "support" / "zygote.py")], **pipes, env=environment(), cwd=ROOT
    )


def fork(
    words: list[str], environments: list[dict[str, str]], timeout: float, cwd: Path
) -> subprocess.CompletedProcess:
    """Run a Python program from the zygote, one process in each environment, all in one folder."""
    with tempfile.TemporaryDirectory() as folder:
        outs, errors = ([Path(folder, f"{kind}{n}") for n in range(len(environments))] for kind in ("out", "err"))
        files = {"outs": list(map(str, outs)), "errs": list(map(str, errors))}
        server = zygote()
        server.stdin.write(json.dumps({"words": words, "envs": environments, "cwd": str(cwd)} | files) + "\n")
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


def start(words: list[str], folder: Path = ROOT, **variables: str) -> subprocess.Popen:
    """Start a command, in a folder and in a session of its own, so that a signal reaches whom the test means."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(words, **pipes, env=environment(**variables), cwd=folder, start_new_session=True)


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
    """The log without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in lines]


def bare_ranks(
    config: Path, run: Path, disturb: str, *more, folders: tuple[Path, Path] = (ROOT, ROOT), **variables: str
) -> list[subprocess.Popen]:
    """Two ranks without a launcher that would tidy up after one of them, as under a plain `srun`.

    Args:
        folders: where each of them is started.
    """
    words = command("driven", "--config", config, "--run.folder", run, *SAVING, *more)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"DISTURB": disturb, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | variables
    return [
        start(words, folder, RANK=rank, LOCAL_RANK=rank, **shared) for rank, folder in zip("01", folders, strict=True)
    ]


def ended(process, seconds: float) -> tuple[float, str]:
    """Seconds until a process ended, and what it printed as errors."""
    began = time.monotonic()
    _, errors = process.communicate(timeout=seconds)
    return time.monotonic() - began, errors
