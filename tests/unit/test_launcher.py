"""What `accelerate launch` was told for another job is refused, or has no effect and is said."""

import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DynamoBackend

from harness.distributed.launcher import (
    asked_for_cpu,
    launched_precision,
    overridden,
    refuse_other_parallelism,
    settings_file,
    start_accelerator,
    tasks_apart,
)
from support.processes import ROOT, start

FILE = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "num_machines": 1}
FILE |= {"machine_rank": 0, "use_cpu": True, "mixed_precision": "no"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context or sequence parallelism"),
        ("ACCELERATE_USE_SAGEMAKER", "SageMaker's own data parallelism"),
    ],
)
def test_another_parallelism_of_the_launcher_is_refused_with_the_file_and_the_flag(name, kind):
    with pytest.raises(ValueError, match=rf"asks for {kind} \(.*job\.yaml\).*accelerate launch --multi_gpu") as caught:
        refuse_other_parallelism({name: "true"}, "job.yaml")
    assert "python launch/train.py" in str(caught.value)
    refuse_other_parallelism({name: "false"}, "job.yaml")


def test_sagemaker_that_only_starts_processes_is_no_parallelism():
    refuse_other_parallelism({"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO"}, "")


def test_what_is_overridden_is_named_and_defaults_are_not():
    defaults = {
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    assert overridden(defaults) == overridden({}) == []
    found = overridden(
        {
            "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            "ACCELERATE_MIXED_PRECISION": "fp8",
            "ACCELERATE_TORCH_DEVICE": "meta",
        }
    )
    assert found == [
        "dynamo INDUCTOR (the setting is run.compile)",
        "4 gradient accumulation steps (the setting is optim.micro_batch)",
        "precision fp8 (the setting is run.precision)",
        "device meta",
    ]


def test_a_device_and_a_compiler_of_the_environment_have_no_effect(monkeypatch):
    for name, value in (("DYNAMO_BACKEND", "INDUCTOR"), ("TORCH_DEVICE", "meta"), ("GRADIENT_ACCUMULATION_STEPS", "4")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    for state in (AcceleratorState, GradientState, PartialState):  # they are shared in a process
        monkeypatch.setattr(state, "_shared_state", {})
    accelerator = start_accelerator("fp32", cuda=False)
    assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.device.type == "cpu"


@pytest.mark.parametrize(
    ("environment", "n"),
    [({"SLURM_STEP_NUM_TASKS": "8"}, 8), ({"OMPI_COMM_WORLD_SIZE": "2"}, 2), ({"SLURM_NTASKS": "8"}, 1), ({}, 1)],
)
def test_tasks_that_know_nothing_of_each_other_are_counted(environment, n):
    """A job has SLURM_NTASKS; only its steps, which srun starts, have several tasks."""
    assert tasks_apart(environment) == n


def test_a_mac_computes_on_its_cpu_since_its_gpu_has_no_float64(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for state in (AcceleratorState, GradientState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    assert start_accelerator("fp32", cuda=False).device == torch.device("cpu")


def test_the_launchers_precision_counts_only_where_the_settings_leave_it_open():
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert launched_precision("auto", bf16) == "bf16"
    assert launched_precision("fp32", bf16) == "fp32"
    for other in ("no", "fp8"):
        assert launched_precision("auto", {"ACCELERATE_MIXED_PRECISION": other}) == "auto"
    assert launched_precision("auto", {}) == "auto"


def test_a_cpu_that_the_launcher_was_asked_for_is_taken_though_there_is_a_gpu():
    assert asked_for_cpu({"ACCELERATE_USE_CPU": "True"})
    assert asked_for_cpu({"ACCELERATE_USE_CPU": "true"})
    assert not asked_for_cpu({"ACCELERATE_USE_CPU": "False"})
    assert not asked_for_cpu({})


def test_the_file_is_the_one_of_the_launchers_command_line_or_the_default(tmp_path):
    default = tmp_path / "default.yaml"
    words = ["python", "accelerate", "launch", "--config_file", "a.yaml", "train.py", "--config_file", "b.yaml"]
    assert settings_file(words, default) == "a.yaml"
    assert settings_file(["accelerate", "launch", "--config-file=c.yaml", "train.py"], default) == "c.yaml"
    assert settings_file(["accelerate", "launch", "train.py"], default) == "the environment"
    default.touch()
    assert settings_file(["accelerate", "launch", "train.py"], default) == str(default)
    assert settings_file(["bash"], default) == "the environment"


def by_file(tmp_path, tiny, *words, **settings) -> tuple[int, str, str]:
    """Train under `accelerate launch` with a settings file of its own: exit code, words, errors."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(FILE | settings))
    process = start(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words),
            *("--config_file", str(tmp_path / "job.yaml"), str(ROOT / "launch" / "train.py"), "--config", str(tiny)),
        ],
        CUDA_VISIBLE_DEVICES="",
        HF_HOME=str(tmp_path),
    )
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


@pytest.mark.slow
def test_a_file_of_accelerate_for_a_sharded_job_is_refused_by_its_name(tmp_path, tiny):
    sharded = {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2},
        "num_processes": 2,
        "main_process_port": 0,
    }
    code, _, error = by_file(tmp_path, tiny, **sharded)
    assert code == 1
    assert f"asks for FSDP ({tmp_path / 'job.yaml'})" in error
    code, out, error = by_file(tmp_path, tiny, "--multi_gpu", **sharded)
    assert code == 0, error
    assert "2 processes on CPU" in out


@pytest.mark.slow
def test_a_file_of_accelerate_that_compiles_and_accumulates_changes_nothing_and_is_said(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "dynamo")
    code, out, error = by_file(tmp_path, tiny, dynamo_config={"dynamo_backend": "INDUCTOR"})
    assert code == 0, error
    assert "dynamo INDUCTOR (the setting is run.compile)" in out
    assert str(tmp_path / "job.yaml") in out
    assert "torchdynamo start" not in error
