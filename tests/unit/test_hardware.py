"""Choices of precision follow the device, and a wheel without kernels for the GPU is refused with what to install."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from harness.config import Config
from harness.distributed import hardware
from harness.distributed.hardware import (
    check_wheel,
    choose_memory_format,
    choose_precision,
    decode_threads,
    describe_arithmetic,
    free_memory,
    quota_cores,
    set_arithmetic,
    set_thread_device,
)
from harness.training.machine import check_cores, check_shared_memory
from tests.support.processes import ROOT

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
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(hardware, "quota_cores", lambda: None)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert decode_threads(0) == 3
    assert decode_threads(5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert decode_threads(0) == 1


def test_slurm_may_have_given_fewer_cores_than_the_process_can_see(monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(hardware, "quota_cores", lambda: None)
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


def cgroup(root, membership: str, **files: str):
    """A root folder whose process is in these control groups; `__` in a name stands for a slash."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / re.sub("(cpu|memory)_(?=[a-z])", r"\1.", name.replace("__", "/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu_max": "150000 100000"}, 2),  # docker --cpus 1.5, in a namespace of its own
        ("0::/\n", {"cpu_max": "20000 100000"}, 1),
        ("0::/\n", {"cpu_max": "max 100000"}, None),
        ("0::/\n", {"cpu_max": "nonsense"}, None),
        ("0::/\n", {}, None),
        ("0::/pod/job\n", {"pod__cpu_max": "300000 100000", "pod__job__cpu_max": "max 100000"}, 3),  # the parent's
        ("0::/pod/job\n", {"pod__cpu_max": "800000 100000", "pod__job__cpu_max": "200000 100000"}, 2),
        ("0::/not/mounted\n", {"cpu_max": "400000 100000"}, 4),
        ("0::/../../other\n", {"cpu_max": "400000 100000"}, 4),
        (
            "3:cpu,cpuacct:/docker/ab\n0::/\n",
            {"cpu,cpuacct__cpu.cfs_quota_us": "250000", "cpu,cpuacct__cpu.cfs_period_us": "100000"},
            3,
        ),
        (
            "1:cpu:/docker/ab\n",
            {"cpu__docker__ab__cpu.cfs_quota_us": "50000", "cpu__docker__ab__cpu.cfs_period_us": "100000"},
            1,
        ),
        ("1:cpu:/\n", {"cpu__cpu.cfs_quota_us": "-1", "cpu__cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_cpu_quota_of_a_container_is_rounded_up(tmp_path, membership, files, cores):
    assert quota_cores(cgroup(tmp_path, membership, **files)) == cores


@pytest.mark.parametrize(
    ("membership", "files", "free"),
    [
        ("0::/\n", {}, 8000),
        ("0::/\n", {"memory_max": "max", "memory_current": "10", "memory_stat": ""}, 8000),
        (
            "0::/\n",
            {"memory_max": "5000", "memory_current": "3000", "memory_stat": "anon 1\ninactive_file 500\n"},
            2500,
        ),
        ("0::/\n", {"memory_max": "5000", "memory_current": "6000", "memory_stat": ""}, 0),
        (
            "0::/pod/job\n",
            {
                **{"pod__memory_max": "4000", "pod__memory_current": "3000", "pod__memory_stat": ""},
                **{"pod__job__memory_max": "9000", "pod__job__memory_current": "100", "pod__job__memory_stat": ""},
            },
            1000,
        ),
        (
            "4:memory:/docker/ab\n",
            {
                "memory__memory.limit_in_bytes": "7000",
                "memory__memory.usage_in_bytes": "3000",
                "memory__memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
            4100,
        ),
    ],
)
def test_free_memory_is_that_of_the_container_where_it_has_less(tmp_path, monkeypatch, membership, files, free):
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    assert free_memory(cgroup(tmp_path, membership, **files)) == free


def test_where_there_are_no_control_groups_there_is_no_quota(tmp_path):
    assert quota_cores(tmp_path) is None


def test_a_containers_quota_limits_the_threads_and_the_doctor_says_so(monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(hardware, "quota_cores", lambda: 8)
    assert decode_threads(0) == 4
    (found,) = check_cores(Config())
    assert "4 core(s) for this process" in found.message
    assert "8 of the CPU quota of its container, shared by 2 processes" in found.message
    monkeypatch.setattr(hardware, "quota_cores", lambda: None)
    assert decode_threads(0) == 32
    assert "64 of its CPU affinity" in check_cores(Config())[0].message


def test_little_shared_memory_is_a_warning_with_its_mend_where_gpus_exchange_through_it():
    (found,) = check_shared_memory(8, 64 * 2**20)
    assert found.level == "warn"
    assert "/dev/shm has 64 MiB" in found.message
    for word in ("docker run --shm-size=1g", "--ipc=host", "medium: Memory"):
        assert word in found.fix
    assert check_shared_memory(8, 2**30) == check_shared_memory(8, None) == []
    assert check_shared_memory(1, 64 * 2**20) == []


@pytest.fixture
def arithmetic(monkeypatch):
    """Whatever a test chooses is undone."""
    monkeypatch.setenv(hardware.CUBLAS, ":0:0")
    cudnn = torch.backends.cudnn
    before = torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    yield
    torch.backends.cuda.matmul.allow_tf32 = before[0]
    _, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_on_or_off_for_products_and_convolutions(arithmetic, monkeypatch, tf32):
    set_arithmetic(tf32, deterministic=False)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    if hasattr(torch.backends.mkldnn, "matmul"):  # of newer torch
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # a CPU's products stay as they are
    assert torch.backends.cudnn.allow_tf32 == tf32
    for capability, shown in (((8, 0), tf32), ((7, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert describe_arithmetic(torch.device("cuda")) == (", TF32" if shown else "")
    assert describe_arithmetic(torch.device("cpu")) == ""


def test_deterministic_kernels_are_asked_of_torch_cudnn_and_cublas(arithmetic, monkeypatch):
    set_arithmetic(True, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert hardware.os.environ[hardware.CUBLAS] == ":4096:8"
    assert describe_arithmetic(torch.device("cpu")) == ", deterministic"
    monkeypatch.setenv(hardware.CUBLAS, ":16:8")  # the user's, as good
    set_arithmetic(True, deterministic=True)
    assert hardware.os.environ[hardware.CUBLAS] == ":16:8"


def test_deterministic_kernels_are_refused_where_cuda_started_before_cublas_was_told(arithmetic, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=r"'run.deterministic' needs CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        set_arithmetic(True, deterministic=True)


@pytest.mark.parametrize("keeps", [True, False])
def test_memory_that_tensors_free_is_taken_again_without_page_faults(keeps):
    """A tensor of 1 MiB, 256 times: 256 pages each time where the memory went back to the system."""
    code = f"""
import resource, torch
from harness.distributed.hardware import keep_freed_memory
if {keeps}: keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**18); before = faults()
for _ in range(256): torch.ones(2**18)
print(faults() - before)
"""
    fixed = os.environ | {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"
    }  # glibc's own grows with what is freed
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=fixed, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 4096) == keeps, done.stdout
