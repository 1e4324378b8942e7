"""launch/train.py with a fault at a chosen step: `DISTURB="die@3:1 ..." python tests/support/driven.py --config ...`.

A disturbance is KIND@STEP or KIND@STEP:RANK (else on every rank). Kinds: stop (touch RUN/stop), die (SIGKILL), hang
(sleep for ever), slow (from that step on sleep SLOW_S, else 0.3 s), raise, nan (an image of the batch), inf (a weight),
elsewhere (as STEP 0, from the start: the working directory is its subfolder `elsewhere`),
stop-val and stop-test (touch RUN/stop at unit number STEP of that split), fill-test (fill the disk then). It adds a model that normalises each image
by itself, so that nothing depends on how a batch is shared out, and one that is tiny.
"""

import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, ResNet

import harness.distributed.heartbeat
import harness.distributed.launcher
import harness.evaluation.predict
import harness.training.step
from launch.train import main

harness.distributed.heartbeat.DEAD_S = float(os.environ.get("DEAD_S", harness.distributed.heartbeat.DEAD_S))
harness.distributed.launcher.COLLECTIVE_TIMEOUT_S = float(
    os.environ.get("COLLECTIVE_TIMEOUT_S", harness.distributed.launcher.COLLECTIVE_TIMEOUT_S)
)
RANK = int(os.environ.get("RANK", "0"))
steps, units = 0, Counter()


def tiny_group_norm(weights=None, **options):
    return ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=partial(nn.GroupNorm, 8), **options)


def tiny_conv(weights=None, num_classes=7, **options):
    """So few weights that a whole run takes a moment; batch normalisation gives it buffers."""
    stem = (nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stem, nn.Linear(8, num_classes))


for builder in (tiny_group_norm, tiny_conv):
    builder.__module__ = "torchvision.models.tiny"  # where torchvision looks for its own
    register_model()(builder)


def disturbances(kinds: str, number: int) -> list[str]:
    """Which kinds of fault are due now on this rank."""
    due = []
    for word in os.environ.get("DISTURB", "").split():
        kind, _, place = word.partition("@")
        step, _, rank = place.partition(":")
        here = number >= int(step) if kind == "slow" else number == int(step)
        if kind in kinds.split() and here and rank in ("", str(RANK)):
            due.append(kind)
    return due


def run_folder() -> Path:
    return Path(sys.argv[sys.argv.index("--run.folder") + 1])


if disturbances("elsewhere", 0):  # another disk under the same name
    os.chdir("elsewhere")


def disturbed_step(config, world, state, views, *rest, step=harness.training.step.optimizer_step):
    global steps
    steps += 1
    for kind in disturbances("stop die hang slow raise nan inf", steps):
        if kind == "stop":
            (run_folder() / "stop").touch()
        elif kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            time.sleep(3600)
        elif kind == "slow":
            time.sleep(float(os.environ.get("SLOW_S", "0.3")))
        elif kind == "raise":
            raise ValueError("a fault that was asked for")
        elif kind == "nan":
            views[0, 0, 0, 0] = float("nan")
    done = step(config, world, state, views, *rest)
    if disturbances("inf", steps):
        with torch.no_grad():
            next(weight for weight in state.model.parameters() if weight.ndim == 1)[0] = float("inf")
    return done


def disturbed_units(reader, *rest, batches=harness.evaluation.predict.evaluation_batches):
    split = reader.shards[0].split
    for batch in batches(reader, *rest):
        units[split] += 1
        for _ in disturbances(f"stop-{split}", units[split]):
            (run_folder() / "stop").touch()
        if disturbances(f"fill-{split}", units[split]):
            with suppress(OSError), open(run_folder().parent / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))
        yield batch


harness.training.step.optimizer_step = disturbed_step
harness.evaluation.predict.evaluation_batches = disturbed_units

if __name__ == "__main__":
    sys.exit(main())
