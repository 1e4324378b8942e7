"""launch/train.py with a fault at a chosen step: `DISTURB="die@3:1 ..." python tests/support/driven.py --config ...`.

A disturbance is KIND@STEP or KIND@STEP:RANK (else on every rank). Kinds: stop (touch RUN/stop), die (SIGKILL), hang
(sleep for ever), long-save (the checkpoint of that step takes SLOW_S), late-save
(it is written when one more step was made), slow (from that step on sleep SLOW_S, else 0.3 s),
raise, memory (a bare MemoryError), bug (an error that is not expected), overflow (of gradients), nan (an image of the batch),
inf (a weight), stop-val and stop-test (touch RUN/stop at unit number STEP of that split), fill-test (fill the disk then),
elsewhere (as STEP 0, from the start: the working directory is its subfolder `elsewhere`).

It adds models: one in double precision that normalises each image by itself, so that nothing depends on how a batch is shared out,
one that is tiny, one that meets the other ranks in each forward pass, and one with a weight that is not used.

FITS=N or N:RANK: forward passes of more than N images run out of memory. LOSS_SCALE=X: fp16's loss scaling, on a CPU.
ONCE=1: no disturbance after the launcher has restarted the processes.
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
import harness.distributed.rendezvous
import harness.distributed.world
import harness.evaluation.predict
import harness.run.checkpoint
import harness.training.epoch
import harness.training.step
import harness.training.storage
from launch.train import main
from shards.terminal import run_and_exit

for name in ("DEAD_S", "STUCK_S", "TURN_S"):
    if name in os.environ:
        setattr(harness.distributed.heartbeat, name, float(os.environ[name]))
harness.distributed.rendezvous.COLLECTIVE_TIMEOUT_S = float(
    os.environ.get("COLLECTIVE_TIMEOUT_S", harness.distributed.rendezvous.COLLECTIVE_TIMEOUT_S)
)
RANK = int(os.environ.get("RANK", "0"))
steps, units = 0, Counter()


def tiny_group_norm(weights=None, **options):
    return ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=partial(nn.GroupNorm, 8), **options)


class ReducingNorm(nn.GroupNorm):
    """Meets the other ranks in each forward pass, as SyncBatchNorm does on GPUs."""

    def forward(self, images):
        if self.training and torch.distributed.is_initialized():
            torch.distributed.all_reduce(torch.zeros(1))
        return super().forward(images)


def tiny_reducing(weights=None, **options):
    return ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=partial(ReducingNorm, 8), **options)


class DoublePrecision(ResNet):
    """Its sums differ by their order at the sixteenth digit, so that nothing hides behind rounding."""

    def forward(self, images):
        return super().forward(images.double())


def tiny_double(weights=None, **options):
    return DoublePrecision(BasicBlock, [1, 1, 1, 1], norm_layer=partial(nn.GroupNorm, 8), **options).double()


def tiny_unused(weights=None, **options):
    model = tiny_group_norm(**options)
    model.spare = nn.Parameter(torch.zeros(3))
    return model


def tiny_conv(weights=None, num_classes=7, **options):
    """So few weights that a whole run takes a moment; batch normalisation gives it buffers."""
    stem = (nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stem, nn.Linear(8, num_classes))


for build in (tiny_double, tiny_reducing, tiny_unused, tiny_conv):
    build.__module__ = "torchvision.models.tiny"  # where torchvision looks for its own
    register_model()(build)


def disturbances(kinds: str, number: int) -> list[str]:
    """Which kinds of fault are due now on this rank."""
    due = []
    if "ONCE" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return due
    for word in os.environ.get("DISTURB", "").split():
        kind, _, place = word.partition("@")
        step, _, rank = place.partition(":")
        here = number >= int(step) if kind == "slow" else number == int(step)
        if kind in kinds.split() and here and rank in ("", str(RANK)):
            due.append(kind)
    return due


def run_folder() -> Path:
    return Path(sys.argv[sys.argv.index("--run.folder") + 1])


if disturbances(
    "elsewhere", 0
):  # another copy under the same name, as of a cache that shows new files and an old checkpoint
    os.chdir("elsewhere")
    harness.training.storage._comes = lambda file: True


def disturbed_step(config, world, state, views, *rest, take=harness.training.step.optimizer_step):
    global steps
    hooks = []
    steps += 1
    for kind in disturbances("stop die hang slow raise memory bug overflow nan inf", steps):
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
        elif kind == "memory":
            raise MemoryError
        elif kind == "bug":
            raise KeyError("a bug")
        elif kind == "overflow":
            weight = next(state.model.parameters())
            hooks.append(weight.register_hook(lambda gradient: gradient * float("inf")))
        elif kind == "nan":
            views[0, 0, 0, 0] = float("nan")
    done = take(config, world, state, views, *rest)
    for hook in hooks:
        hook.remove()
    if disturbances("inf", steps):
        with torch.no_grad():
            next(weight for weight in state.model.parameters() if weight.ndim == 1)[0] = float("inf")
    return done


def limited_pass(model, loss_fn, images, *rest, run=harness.training.step.forward_backward):
    most, _, rank = os.environ.get("FITS", "").partition(":")
    if most and len(images) > int(most) and rank in ("", str(RANK)):
        raise torch.OutOfMemoryError("CUDA out of memory. (A test's)")
    return run(model, loss_fn, images, *rest)


def scaled_world(*arguments, start=harness.distributed.world.start_accelerator):
    accelerator = start(*arguments)
    if "LOSS_SCALE" in os.environ:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=float(os.environ["LOSS_SCALE"]))
    return accelerator


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


def disturbed_save(run, progress, *rest, save=harness.run.checkpoint.save_step):
    if disturbances("long-save", progress.step):
        time.sleep(float(os.environ["SLOW_S"]))
    if disturbances("late-save", progress.step):
        deadline = time.monotonic() + 60
        while steps < progress.step + 1:
            assert time.monotonic() < deadline, "no step was made while the checkpoint waited"
            time.sleep(0.01)
    save(run, progress, *rest)


harness.training.epoch.optimizer_step = disturbed_step
harness.training.step.forward_backward = limited_pass
harness.distributed.world.start_accelerator = scaled_world
harness.run.checkpoint.save_step = disturbed_save
harness.evaluation.predict.evaluation_batches = disturbed_units

if __name__ == "__main__":
    run_and_exit(main)
