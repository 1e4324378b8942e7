"""Threads and memory for decoding, which an interrupt (Ctrl-C) can neither hang nor leave behind.

In: tasks; shapes of batches. Out: a queue for each task's result; arrays whose memory is used again. Invariants: tasks
start in the order given; `close` returns when no task runs any more; memory is lent to one tensor at a time.
"""

import weakref
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

import numpy as np
import torch

from harness.distributed.hardware import set_thread_device


class TaskThreads:
    """Threads that start tasks in the order given. In place of `ThreadPoolExecutor`, which Ctrl-C can hang.

    Made of `SimpleQueue`s alone: they are written in C, so an interrupt cannot come between taking a lock and noting that
    it is held. Inside the conditions of `concurrent.futures` it can, and closing then waits for ever (seen within some
    hundred interrupts). For the same reason the threads are bare ones: a `Thread` runs Python code when it is freed, and
    an interrupt there is swallowed.
    """

    def __init__(self, threads: int, device: torch.device):
        """Start this many threads."""
        self._tasks, self._ended, self._threads = SimpleQueue(), SimpleQueue(), threads
        try:
            for _ in range(threads):
                start_new_thread(self._work, (device,))
        except BaseException:
            self._dismiss()
            raise

    def submit(self, task: Callable) -> SimpleQueue:
        """A queue that will hold one item: what the task returns and None, or None and the error that it raised."""
        done = SimpleQueue()
        self._tasks.put((task, done))
        return done

    def close(self) -> None:
        """Drop the tasks that no thread has started, wait for the others, and end the threads."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        self._dismiss()
        for _ in range(self._threads):
            self._ended.get()

    def _dismiss(self) -> None:
        """Have each thread end after the tasks before this."""
        for _ in range(self._threads):
            self._tasks.put(None)

    def _work(self, device: torch.device) -> None:
        """What each thread does: tasks until a None."""
        ready = False
        while (entry := self._tasks.get()) is not None:
            task, done = entry
            try:
                if not ready:  # here, where an error reaches who waits for the task: a thread that dies answers nobody
                    set_thread_device(device)
                    ready = True
                done.put((task(), None))
            except BaseException as error:
                done.put((None, error))
            del entry, task, done  # not kept alive while this thread waits
        self._ended.put(None)


class _Lent(weakref.ref):
    """A weak reference to memory that was lent as an array, which keeps the memory itself."""

    __slots__ = ("memory",)
    memory: np.ndarray


class Buffers:
    """Memory for batches of images, lent again once no tensor refers to it any more.

    Fresh memory would be cleared by the kernel page by page, while the threads wait for each other.

        take() --> view of the memory, inside a tensor --> tensor freed --> its _Lent is in _free --> take()
    """

    def __init__(self):
        """Start with no memory."""
        self._free: deque[_Lent] = deque()
        self._lent: dict[int, _Lent] = {}  # by id: keeps each _Lent alive until its view is freed

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory of that shape, uint8, with whatever was in it."""
        try:
            back = self._free.popleft()
            memory = self._lent.pop(id(back)).memory
        except IndexError:
            memory = np.empty(shape, np.uint8)
        if memory.shape != shape:  # the last batch of a split may be shorter
            memory = np.empty(shape, np.uint8)
        view = memory.view()
        # The callback is a method in C: an interrupt that came inside one in Python would be swallowed.
        lent = _Lent(view, self._free.append)
        lent.memory = memory
        self._lent[id(lent)] = lent
        return torch.from_numpy(view)
