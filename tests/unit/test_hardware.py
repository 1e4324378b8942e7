"""Choices of precision follow the device, and a wheel without kernels for the GPU is refused with what to install."""

import pytest
import torch

from harness.distributed import hardware
from harness.distributed.hardware import (
    check_wheel,
    choose_memory_format,
    choose_precision,
    decode_threads,
    set_thread_device,
)

NEW = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # torch 2.15's
OLD = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]  # torch 2.7.1's


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((6, 0), NEW, False),
        ((7, 0), NEW, False),
        ((6, 0), OLD, True),
        ((7, 0), OLD, True),
        ((7, 5), NEW, True),
        ((8, 9), NEW, True),
        ((9, 0), NEW, True),
        ((12, 1), NEW, True),
        ((10, 0), OLD, False),
    ],
)
def test_a_wheel_runs_where_it_has_kernels_of_the_same_major_version(capability, architectures, runs):
    if runs:
        check_wheel(capability, architectures, "card")
    else:
        cure = "built for it" if capability > (9, 0) else r"legacy-gpu"
        with pytest.raises(ValueError, match=rf"no kernels for card.*{cure}"):
            check_wheel(capability, architectures, "card")


def test_auto_asks_for_real_bf16_and_takes_fp16_where_it_is_only_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_precision("auto", torch.device("cuda"))[0] == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", torch.device("cuda"))[0] == "bf16"


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_cpu_follows_its_instructions(monkeypatch, has, expected):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: has)
    assert choose_precision("auto", torch.device("cpu"))[0] == expected


def test_what_was_asked_for_is_taken_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_precision("fp16", torch.device("cuda"))[0] == "fp16"
    with pytest.raises(ValueError, match="bf16 needs a GPU that has it"):
        choose_precision("bf16", torch.device("cuda"))
    assert choose_precision("bf16", torch.device("cpu"))[0] == "bf16"
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        choose_precision("fp16", torch.device("cpu"))


def test_threads_are_this_processs_share_of_the_cores_it_may_use(monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(12)))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert decode_threads(0) == 3
    assert decode_threads(5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert decode_threads(0) == 1


def test_slurm_may_have_given_fewer_cores_than_the_process_can_see(monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")
    assert decode_threads(0) == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert decode_threads(0) == 6


@pytest.mark.parametrize(
    ("capability", "asked", "last"),
    [((6, 0), "auto", False), ((6, 0), "on", True), ((7, 0), "auto", True), ((9, 0), "off", False)],
)
def test_channels_come_last_where_there_are_tensor_cores(monkeypatch, capability, asked, last):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = choose_memory_format(asked, torch.device("cuda"))
    assert chosen == (torch.channels_last if last else torch.contiguous_format)
    assert choose_memory_format("auto", torch.device("cpu")) == torch.channels_last


def test_a_thread_keeps_its_own_gpu_where_the_device_has_no_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        set_thread_device(torch.device(name))
    assert chosen == [torch.device("cuda:1")]
