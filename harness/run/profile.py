"""Where the time of a step goes: torch.profiler over some steps of rank 0, once a run.

In: how many steps, a run's folder. Out: `RUN/profile/rank0.pt.trace.json.gz` for Perfetto, chrome://tracing or TensorBoard's
profiler plugin, and the ten longest operators in the log. Invariants: nothing is recorded unless it was asked for.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from harness.run.console import LOGGER

WARM_UP = 10  # steps before the first that is recorded: compiled kernels, cuDNN's choices, filled caches
LONGEST = 10  # operators that are named


class StepProfiler:
    """Records steps WARM_UP + 1 to WARM_UP + `steps` of this process."""

    def __init__(self, steps: int, folder: Path, device: torch.device, writes: bool):
        """Record nothing yet; `writes` says whether this rank is the one that records."""
        self._folder, self._device, self._steps = folder / "profile", device, steps if writes else 0
        self._profiler: profile | None = None

    def __enter__(self) -> "StepProfiler":
        if self._steps:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(
                activities=activities,
                schedule=schedule(skip_first=WARM_UP - 2, wait=0, warmup=2, active=self._steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profiler.start()
        return self

    def __exit__(self, *error) -> None:
        if self._profiler:
            self._profiler.stop()
            self._profiler = None

    def step(self) -> None:
        """Note the end of a step."""
        if self._profiler:
            self._profiler.step()

    def _write(self, found: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / "rank0.pt.trace.json.gz"
        found.export_chrome_trace(str(path))
        for line in longest_operators(found, self._device):
            LOGGER.info(line)
        LOGGER.info(f"profile of {self._steps} steps: {path} (open it in ui.perfetto.dev)")


def longest_operators(found: profile, device: torch.device) -> list[str]:
    """The operators with the most time of their own (without those that they call), one line each with calls and ms."""
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [(getattr(row, name), row.count, row.key) for row in found.key_averages()]
    rows = [row for row in rows if not row[2].startswith("ProfilerStep")]
    total = max(1e-9, sum(time for time, _, _ in rows))
    lines = [f"{'operator':<48}{'calls':>8}{'ms':>10}{'share':>8}  ({device.type} time of its own)"]
    for time, count, key in sorted(rows, reverse=True)[:LONGEST]:
        lines.append(f"{key[:46]:<48}{count:>8}{time / 1e3:>10.1f}{time / total:>8.1%}")
    return lines
