"""Every state in which a kill can leave a run folder, and what the same command makes of each.

`python tests/support/crashes.py UNDISTURBED EVERY WORDS... --run.folder FOLDER` runs tests/support/driven.py with these words
and keeps what is in the folder before each operation on its files, as Python's audit events tell them. That is what a kill
leaves there: what is still in a process's own buffers is lost. A write is also seen empty and cut in its middle. Equal states
are kept once. A lock is left out: its owner is dead.

Each state is put into FOLDER-again/N, and there the command goes on to its end, which is compared with UNDISTURBED, a run that
nothing happened to. Left out are all but every 4th state of the evaluation, every 20th of the report, and every EVERYth
write of the training. Each is a process of its own, forked from this one, which has imported everything and started no thread.
"""

import json
import os
import pickle
import sys
import threading
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.figure  # noqa: F401
import scipy.optimize  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from driven import main
from processes import assert_equal_weights, deterministic_log, state, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.config import Config, read_config
from harness.distributed.world import World
from harness.report.page import draw_report
from harness.training.train import train
from shards.index import load

CORES = sorted(os.sched_getaffinity(0))  # each process gets one of them: two that share them wait for each other
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")  # and open, for writing
State = dict[str, bytes | None]  # contents by path; None for a folder


class Recorder:
    """An audit hook: Python calls it before it does what an event names. A place is such an event, or a write before it."""

    def __init__(self, folder: Path):
        self.folder, self.places = folder, 0
        self.states: dict[bytes, str] = {}  # each with the place that it was first seen at
        found = contents(folder)
        self._before = {number: found[path] for path, number in self._numbers(found).items()}  # contents by inode
        self._looking, self._lock = False, threading.RLock()

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in EVENTS:
            return
        place = f"{event} {os.path.basename(os.fspath(arguments[0]))}"
        with self._lock:
            if not self._looking and "lock." not in place:
                self._looking = True
                self.look(place)
                self._looking = False

    def look(self, place: str) -> None:
        """Keep what is there, and what was there in the middle of what was written since the last look."""
        now = contents(self.folder)
        numbers = self._numbers(now)
        for path, data in now.items():
            before = self._before.get(numbers.get(path), b"")
            if data and data != before:
                begun = len(before) if data.startswith(before) else 0  # else it was emptied first
                for end in {begun, begun + (len(data) - begun) // 2}:
                    self._keep(now | {path: data[:end]}, f"write of {path}, before {place}")
        self._keep(now, place)
        self._before = {number: now[path] for path, number in numbers.items()}

    def _numbers(self, found: State) -> dict[str, int]:
        """Inodes of files: one that was moved has kept it."""
        return {path: (self.folder / path).stat().st_ino for path, data in found.items() if data is not None}

    def _keep(self, found: State, place: str) -> None:
        self.places += 1
        self.states.setdefault(pickle.dumps(sorted(found.items())), place)


def contents(folder: Path) -> State:
    """What is in a folder, without its lock."""
    found = {}
    for path in folder.rglob("*"):
        if not path.name.startswith((".lock", "lock.json")):
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def put(found: State, folder: Path) -> None:
    """Make a folder with these contents."""
    folder.mkdir(parents=True)
    for path, data in sorted(found.items()):
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


def record(states: Path, words: list[str]) -> None:
    """In a new process: run, and write {"places": their number, "states": [(place, contents)]}."""
    os.sched_setaffinity(0, CORES[:1])
    recorder = Recorder(Path(words[-1]))
    sys.addaudithook(recorder)
    code = main(words)
    recorder.look("the end")
    recorder._looking = True
    kept = [(place, dict(pickle.loads(key))) for key, place in recorder.states.items()]
    states.write_bytes(pickle.dumps({"places": recorder.places, "states": kept}))
    sys.stdout.flush()
    os._exit(code)


def assert_nothing_lost_or_twice(run: Path, undisturbed: Path) -> None:
    """Weights, results and log are those of a run that nothing happened to; nothing stands twice in log or TensorBoard."""
    assert state(run)["status"] == "finished"
    for kind in ("step-", "best-"):
        assert_equal_weights(weights(run, kind), weights(undisturbed, kind))
    for name in ("metrics.json", "predictions.csv"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert deterministic_log(run) == deterministic_log(undisturbed)
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    logged = Counter()
    for entry in deterministic_log(run):
        if entry["kind"] != "result":
            logged |= {(f"{entry['kind']}/loss", entry["step"]): 1}
    shown = Counter((tag, event.step) for tag in {tag for tag, _ in logged} for event in board.Scalars(tag))
    assert shown == logged


def continue_one(found: State, config: Config, undisturbed: Path, report: bool) -> None:
    """In a new process: what launch/train.py does, then compare; FOLDER.txt says what is not well. Drawing takes most time."""
    os.fsync = lambda descriptor: None  # a process that is killed loses nothing that it wrote
    folder = Path(config.run.folder)
    try:
        put(found, folder)
        world = World(config.run.precision)
        assert train(config, world) == "finished"
        if report:
            draw_report(folder, load(config.data.path))
            assert (folder / "report.html").read_text().endswith("</html>\n")
        assert_nothing_lost_or_twice(folder, undisturbed)
    except BaseException:
        folder.with_suffix(".txt").write_text(traceback.format_exc())
    os._exit(0)


def continue_all(recorded: dict, undisturbed: Path, every: int, config: Config) -> None:
    """Print {"places", "states", "continued", "lost": {place: what happened}}."""
    states, base = recorded["states"], Path(f"{config.run.folder}-again")
    kinds = [kind_of(place, found, config.run.epochs) for place, found in states]
    one_in = {"move": 1, "write": every, "evaluation": 4, "report": 20}
    chosen = [n for n, kind in enumerate(kinds) if n % one_in[kind] == 0]
    free, running = list(CORES), {}
    for n in chosen:
        if not free:
            free.append(running.pop(os.wait()[0]))
        core, pid = free.pop(), os.fork()
        if pid == 0:
            os.sched_setaffinity(0, [core])
            there = replace(config, run=replace(config.run, folder=str(base / str(n))))
            continue_one(states[n][1], there, undisturbed, kinds[n] == "report")
        running[pid] = core
    for _ in range(len(running)):
        os.wait()
    said = {n: base / f"{n}.txt" for n in chosen}
    lost = {f"{n}: {states[n][0]}": path.read_text() for n, path in said.items() if path.is_file()}
    print(json.dumps({"places": recorded["places"], "states": len(kinds), "continued": len(chosen), "lost": lost}))


def kind_of(place: str, found: State, epochs: int) -> str:
    """What a run did when its folder held this."""
    said = json.loads(found.get("state.json") or "{}")
    if said.get("status") == "finished":
        return "report"
    if said.get("epoch") == epochs:
        return "evaluation"
    return "write" if place.startswith(("write", "open")) else "move"


if __name__ == "__main__":
    undisturbed, every, *words = sys.argv[1:]
    states = Path(f"{words[-1]}.pickle")
    sys.argv[1:] = words
    config = read_config(words)  # here, so that what this imports is imported once
    if (pid := os.fork()) == 0:
        record(states, words)
    assert os.waitpid(pid, 0)[1] == 0
    continue_all(pickle.loads(states.read_bytes()), Path(undisturbed), int(every), config)
