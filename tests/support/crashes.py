"""Every state in which a kill can leave a run folder, and what the same command makes of each.

`python tests/support/crashes.py UNDISTURBED EVERY WORDS... --run.folder FOLDER` runs tests/support/driven.py with these words
and keeps what is in the folder before each operation on its files, as Python's audit events tell them. That is what a kill
leaves there: what is still in a process's own buffers is lost. A write is also seen empty and cut in its middle. Checkpoints are
written at once in the recorded run, not beside the training, so that the order of its operations is one. Equal states are kept once. A lock is left out: its owner is dead.

Each state is put into FOLDER-again/N, and there the command goes on to its end, which is compared with UNDISTURBED, a run that
nothing happened to. Left out are all but every 4th state of the evaluation, every 20th of the report, and every EVERYth
write of the training. Each is a process of its own, forked from this one, which has imported everything and started no thread.
"""

import json
import os
import pickle
import sys
import traceback
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import matplotlib.figure  # noqa: F401
import scipy.optimize  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from driven import main
from processes import assert_equal_weights, deterministic_log, state, weights
from recorder import Recorder, State, put
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.config import Config, read_config
from harness.distributed.world import World
from harness.report.page import draw_report
from harness.run import writer
from harness.training.train import train
from shards.index import load

CORES = sorted(os.sched_getaffinity(0))  # each process gets one of them: two that share them wait for each other


class AtOnce:
    """In place of the thread that writes checkpoints."""

    def __init__(self, *_):
        """As a ThreadPoolExecutor is made."""

    def submit(self, task, *arguments) -> Future:
        """Do it here; its error is raised here, too."""
        done = Future()
        done.set_result(task(*arguments))
        return done

    def shutdown(self) -> None:
        """Nothing runs."""


def record(states: Path, words: list[str]) -> None:
    """In a new process: run, and write {"places": their number, "states": [(place, contents)]}."""
    os.sched_setaffinity(0, CORES[:1])
    writer.ThreadPoolExecutor = AtOnce
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
