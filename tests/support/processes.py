"""Real processes of ours: started, watched, and what they left in a run folder."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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


@contextmanager
def killed_after(timeout: float, pids: list[int]) -> Iterator[list[bool]]:
    """Processes that have not ended in time are killed, and the list that it gives is no longer empty."""
    late = []

    def end() -> None:
        late.append(True)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    timer = Timer(timeout, end)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def ask(request: dict) -> list[int]:
    """The zygote's answer."""
    server = zygote()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return list(map(int, server.stdout.readline().split()))


def ask_to_begin(
    words: list[str], environments: list[dict[str, str]], cwd: Path, outs: list[Path], errors: list[Path], leads: bool
) -> list[int]:
    """Begin a Python program in each environment, with files for what it prints; the numbers of the processes."""
    files = {"outs": list(map(str, outs)), "errs": list(map(str, errors))}
    return ask({"words": words, "envs": environments, "cwd": str(cwd), "leads": leads} | files)


def fork(
    words: list[str], environments: list[dict[str, str]], timeout: float, cwd: Path
) -> subprocess.CompletedProcess:
    """Run a Python program from the zygote, one process in each environment, all in one folder."""
    with tempfile.TemporaryDirectory() as folder:
        outs, errors = ([Path(folder, f"{kind}{n}") for n in range(len(environments))] for kind in ("out", "err"))
        pids = ask_to_begin(words, environments, cwd, outs, errors, leads=False)
        with killed_after(timeout, pids) as late:
            codes = ask({"wait": pids})
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
    """Start any command, in a folder and in a session of its own, so that a signal reaches whom the test means."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(words, **pipes, env=environment(**variables), cwd=folder, start_new_session=True)


class Begun:
    """A program of ours that was forked from the zygote and is watched as a `subprocess.Popen` is."""

    def __init__(self, words: list[str], folder: Path = ROOT, **variables: str):
        """Start `command(...)` in a folder and in a process group of its own."""
        self.returncode, self.words = None, words
        with tempfile.TemporaryDirectory() as pipes:
            out, error = Path(pipes, "out"), Path(pipes, "err")
            os.mkfifo(out)
            os.mkfifo(error)
            (self.pid,) = ask_to_begin(words[1:], [environment(**variables)], folder, [out], [error], leads=True)
            # Each open waits for the other side's, in the same order.
            self.stdout, self.stderr = (open(path, errors="replace") for path in (out, error))  # noqa: SIM115
        self.handle = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it printed, once it has ended; where it has not in time, it is killed."""
        with ThreadPoolExecutor(2) as threads, killed_after(timeout, [self.pid]) as late:
            out, error = threads.map(lambda pipe: pipe.read(), (self.stdout, self.stderr))
            self.wait()
        if late:
            raise subprocess.TimeoutExpired(self.words, timeout, out, error)
        return out, error

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        if self.returncode is None:
            signal.pidfd_send_signal(self.handle, number)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.handle], [], [], timeout)[0]:
            os.close(self.handle)
            (self.returncode,) = ask({"wait": [self.pid]})
        return self.returncode


def state(run: Path) -> dict:
    """What a run folder's state.json says, empty before there is one."""
    return json.loads((run / "state.json").read_text()) if (run / "state.json").is_file() else {}


def wait_for_step(process: subprocess.Popen | Begun, run: Path, step: int) -> None:
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
) -> list[Begun]:
    """Two ranks without a launcher that would tidy up after one of them, as under a plain `srun`.

    Args:
        folders: where each of them is started.
    """
    words = command("driven", "--config", config, "--run.folder", run, *SAVING, *more)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"DISTURB": disturb, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | variables
    return [
        Begun(words, folder, RANK=rank, LOCAL_RANK=rank, **shared) for rank, folder in zip("01", folders, strict=True)
    ]


def ended(process, seconds: float) -> tuple[float, str]:
    """Seconds until a process ended, and what it printed as errors."""
    began = time.monotonic()
    _, errors = process.communicate(timeout=seconds)
    return time.monotonic() - began, errors
