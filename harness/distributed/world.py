"""The processes of a run and what they tell each other. This room is the only one that knows Accelerate.

In: the environment that a launcher made. Out: a `World`. Invariants: every method that is marked collective is
called by all ranks at the same point, or all of them wait for ever.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from torch import distributed

from harness.distributed.hardware import (
    available_cores,
    choose_memory_format,
    choose_precision,
    describe_arithmetic,
    keep_freed_memory,
)
from harness.distributed.heartbeat import Heartbeat
from harness.distributed.launcher import (
    asked_in_vain,
    check_gpu_of_rank,
    launched_precision,
    start_accelerator,
    tasks_apart,
    uses_cuda,
)
from harness.distributed.rendezvous import meet, open_store, pin_process_group
from harness.distributed.trackers import start_trackers

LOGGER = logging.getLogger("dermharness")
P = ParamSpec("P")
T = TypeVar("T")


class World:
    """All ranks of a run, seen from one of them."""

    def __init__(self, precision: str, channels_last: str = "auto"):
        """Initialise distributed training from the launcher's environment.

        Args:
            precision: auto, fp32, bf16 or fp16; where it is auto, what `accelerate launch --mixed_precision` was given.
            channels_last: auto, on or off.

        Raises:
            ValueError: a torch without kernels for this GPU, more processes than GPUs, ranks that do not see each other,
                or a precision that the device does not have.
            ConnectionError: the processes did not find each other in time.
        """
        cuda = uses_cuda()
        if cuda:
            check_gpu_of_rank()
        precision = launched_precision(precision, os.environ)
        self.precision, self.precision_reason = choose_precision(precision, torch.device("cuda" if cuda else "cpu"))
        in_vain = asked_in_vain(os.environ, cuda)  # before some of it is taken out of the environment
        with meet():
            self._accelerator = start_accelerator(self.precision, cuda)
        if not cuda:
            keep_freed_memory()
            # Launchers set OMP_NUM_THREADS=1, also where one process has all cores: half the speed on two.
            torch.set_num_threads(available_cores())
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        if announced != self._accelerator.num_processes:
            raise ValueError(
                f"The launcher announced {announced} processes, and {self._accelerator.num_processes} see each other. "
                "Start with `accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc-per-node N`."
            )
        self.rank = self._accelerator.process_index
        self.size = self._accelerator.num_processes
        # Accelerate's device has no number where there is one process.
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else self._accelerator.device
        self.memory_format = choose_memory_format(channels_last, self.device)
        self.is_main = self.rank == 0
        for sentence in in_vain:
            self.warn(sentence)
        if self.size == 1 and (n_tasks := tasks_apart(os.environ)) > 1:
            self.warn(
                f"{n_tasks} tasks were started that know nothing of each other, and each does all of the work. For one run on several "
                "processes, let each node's task start them by accelerate launch or torchrun, as launch/slurm/ does"
            )
        self.host_pid = f"{socket.gethostname()}, process {os.getpid()}"
        self._has_trained, self._turns = False, 0  # works of rank 0 that the others waited for
        self.heartbeat: Heartbeat | None = None
        if self.size > 1:
            self.heartbeat = self._start_heartbeat()

    def describe(self) -> str:
        """One line: how many processes on what, in which precision, and why."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        count = "1 process" if self.size == 1 else f"{self.size} processes"
        chosen = f"{self.precision} ({self.precision_reason}){describe_arithmetic(self.device)}"
        return f"{count} on {device}, {chosen}, torch {torch.__version__}"

    def start_trackers(self, names: tuple[str, ...], folder: Path, settings: dict) -> None:
        """Collective: start experiment trackers on rank 0, as `trackers.start_trackers` does."""
        self.run_on_main(start_trackers, self._accelerator, names, folder, settings)

    def track(self, numbers: dict[str, float], step: int) -> None:
        """Send numbers to the trackers, if there are any."""
        self._accelerator.log(numbers, step=step)

    def _start_heartbeat(self) -> Heartbeat:
        """Collective: say to the others that this rank lives, and look whether they do."""
        watched = range(self.size) if self.is_main else [0]
        heartbeat = Heartbeat(open_store(self.is_main), self.rank, watched, self.host_pid)
        self.any_rank(False)  # everyone has said who it is
        heartbeat.start()
        return heartbeat

    def passes(self, place: str) -> None:
        """This rank comes to a point where ranks wait for each other: one that stays behind is stuck, and is named.

        Every rank must pass the same points in the same order. Every collective is one.
        """
        if self.heartbeat:
            self.heartbeat.passes(place)

    def works(self) -> None:
        """A sign of work, where much time may lie between two points; from any thread."""
        if self.heartbeat:
            self.heartbeat.works()

    @contextmanager
    def long_work(self) -> Iterator[None]:
        """Inside, this rank is at work that has a limit of its own, such as a download: nobody takes it for stuck."""
        if self.heartbeat is None:
            yield
            return
        before, self.heartbeat.is_long = self.heartbeat.is_long, True
        try:
            yield
        finally:
            self.heartbeat.is_long = before

    @contextmanager
    def by_itself(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, this rank works on a wrapped model alone: no other is waited for, and none waits for this one."""
        heartbeat, self.heartbeat = self.heartbeat, None
        if heartbeat:
            heartbeat.is_long = True
        try:
            with self.without_sync(model):
                yield
        finally:
            self.heartbeat = heartbeat

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, compile_mode: str | None = None
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Wrap for mixed precision and for averaging gradients over ranks; rank 0's weights become everyone's.

        Args:
            compile_mode: the training step's passes become kernels made for this model and these shapes (torch.compile). The model
                itself stays as it is, so that what is evaluated does not depend on it.
        """
        self.passes("prepare")
        if self.heartbeat:  # kernels are made in the first step: minutes, and not the same on each rank
            self.heartbeat.is_long = compile_mode is not None
        ddp_model, optimizer = self._accelerator.prepare(model, optimizer)
        if compile_mode is not None:
            ddp_model = cast(torch.nn.Module, torch.compile(ddp_model, dynamic=False, mode=compile_mode))
        return ddp_model, optimizer

    @contextmanager
    def reproducible_threads(self) -> Iterator[int]:
        """Inside, arithmetic on a CPU is the same whatever the number of cores and processes.

        Some kernels split a sum over the threads they are given, so each gets one. Yields how many forward passes may
        run beside each other instead: one for each core, or one on a GPU.
        """
        if self.device.type != "cpu":
            yield 1
            return
        torch.set_num_threads(1)
        try:
            yield available_cores()
        finally:
            torch.set_num_threads(available_cores())

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for a model that is not wrapped."""
        return self._accelerator.autocast()

    def without_sync(self, model: torch.nn.Module) -> AbstractContextManager:
        """Backward passes inside do not average gradients over ranks."""
        return self._accelerator.no_sync(model)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass, with the loss scaled where fp16 asks for it; gradients are summed over ranks in it."""
        self.passes("backward")
        self._has_trained = True
        self._accelerator.backward(loss)

    def clip_gradients(self, model: torch.nn.Module, norm: float) -> None:
        """Scale the gradients of a wrapped model down to this norm, where they are longer."""
        self._accelerator.clip_grad_norm_(model.parameters(), norm)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16, None otherwise."""
        return self._accelerator.scaler

    def scale_on_device(self) -> torch.Tensor | None:
        """The scale of the loss in fp16, a scalar that changes in place after each step; None otherwise."""
        return self.scaler._get_scale_async() if self.scaler else None  # the public way waits for the device

    def run_on_main(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Collective: run on rank 0 alone; its result is everyone's, and its error ends every rank.

        No rank goes on before rank 0 is done, however long that takes: what it wrote is there, and a launcher that kills the
        others when one leaves finds nothing half-written. Rank 0 raises its error; the others exit with code 1 and no message.
        """
        if self.heartbeat is None:
            return action(*args, **kwargs)
        result, error, self._turns = None, None, self._turns + 1
        work = getattr(action, "__name__", "work")
        self.passes(work)
        if self.is_main:
            self.heartbeat.begin_turn(work)
            try:
                result = action(*args, **kwargs)
            except Exception as raised:
                error = raised
            self.heartbeat.end_turn(self._turns)
        else:
            self.heartbeat.wait_for_turn(self._turns)
        result, failed = broadcast_object_list([result, error is not None], from_process=0)
        if error is not None:
            raise error
        if failed:
            raise SystemExit(1)
        return result

    def all_gather_objects(self, value) -> list:
        """Collective: every rank's value, by rank; any object that can be pickled."""
        self.passes("all_gather_objects")
        return [value] if self.size == 1 else gather_object([value])

    def synchronize(self) -> None:
        """Wait for the kernels of this rank's GPU, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def hides_bars(self) -> bool | None:
        """What a progress bar's `disable` should be: None on rank 0, where tqdm asks for a terminal, True elsewhere."""
        return None if self.is_main else True

    def print(self, text: str = "") -> None:
        """Log a line on rank 0."""
        if self.is_main:
            LOGGER.info(text)

    def warn(self, text: str) -> None:
        """Log a warning on rank 0."""
        if self.is_main:
            LOGGER.warning(text)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Collective: elementwise sum over ranks, on every rank."""
        if self.size == 1:
            return values
        self.passes("all_reduce_sum")
        if self.heartbeat and self._has_trained:
            self.heartbeat.is_long = False
        return cast(torch.Tensor, reduce(values.to(self.device), reduction="sum"))

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """Collective: tensors of one shape, on the world's device, of all ranks, one after the other."""
        return cast(torch.Tensor, gather(values))

    def gather_on_main(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Collective: tensors of one shape, on the world's device, of all ranks, by rank: on rank 0, and none on the others."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)] if self.is_main else None
        distributed.gather(values, parts, dst=0)
        return parts or []

    def any_rank(self, flag: bool) -> bool:
        """Collective: whether the flag is set on any rank. (Device sync.)"""
        if self.size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor([float(flag)])).item())

    def close(self) -> None:
        """Collective: leave the world in good order."""
        if self.heartbeat:
            self.heartbeat.close()
            self._accelerator.wait_for_everyone()  # rank 0 serves what the others watch by: it leaves when they are done
            pin_process_group()
        self._accelerator.end_training()
