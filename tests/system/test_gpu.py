"""Laws that only a GPU can break: copies that go on while kernels run, the loss scaler, repeated kernels. `pytest -m gpu`."""

import json
import signal
from pathlib import Path

import pytest
import torch

from harness.config import Augment
from harness.data.augment import mix, training_view
from harness.data.decoded import DecodedCache, nbytes_of
from harness.data.loader import LoaderOptions, training_batches
from harness.data.random import uniforms
from harness.run.recovery import find_corruption
from shards.plan import Plan
from shards.reader import SplitReader
from support.images import smooth_images
from support.processes import SAVING, assert_equal_weights, command, deterministic_log, start, state, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
ALL_OF_IT = (
    *("--augment.mixup_prob", "0.4", "--augment.cutmix_prob", "0.4", "--augment.cutout", "0.3"),
    *("--optim.label_smoothing", "0.1", "--optim.balance", "sampler", "--optim.max_grad_norm", "1"),
    *("--optim.ema", "0.9", "--optim.micro_batch", "5", "--model.sync_batchnorm", "true", "--eval.views", "spins:2"),
)


def run(entry: str, *arguments, disturb: str = "") -> tuple[int, str, str]:
    """The program's exit code and words, from a process that was not forked from one with CUDA in it."""
    process = start(command(entry, *arguments), DISTURB=disturb)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


@pytest.mark.parametrize(("ahead", "kept"), [(1, "none"), (4, "none"), (4, "host"), (4, "device")])
def test_batches_on_the_gpu_are_those_of_the_cpu_while_it_is_busy(dataset, ahead, kept):
    reader = SplitReader(dataset, "train")
    shape, cuda = (reader.shard_sizes, reader.height, reader.width), torch.device("cuda")
    memory = {"none": None, "host": memoryview(bytearray(nbytes_of(*shape))), "device": cuda}[kept]
    options = LoaderOptions(3, ahead, cuda, decoded=memory and DecodedCache(*shape, memory))
    plan = Plan(reader.shard_sizes, 12, seed=0)
    big = torch.randn(4096, 4096, device="cuda")
    for epoch in range(8):
        found = []
        for batch in training_batches(reader, plan, epoch, 0, 0, 1, options):
            big = torch.tanh(big @ big)  # the GPU falls behind: what is read or freed too early is wrong below
            found.append((batch.images + 0, batch.labels + 0, batch.positions + 0, batch.keys + 0))
        wanted = list(training_batches(reader, plan, epoch, 0, 0, 1, LoaderOptions(3, 4, torch.device("cpu"))))
        assert len(found) == len(wanted) == plan.n_batches
        for (images, labels, positions, keys), batch in zip(found, wanted, strict=True):
            assert torch.equal(images.cpu(), batch.images)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(labels.cpu(), batch.labels)
            assert torch.equal(positions.cpu(), batch.positions)
            assert torch.equal(keys.cpu(), batch.keys)


def test_the_gpus_memory_does_not_grow_from_epoch_to_epoch(dataset):
    reader, reserved = SplitReader(dataset, "train"), []
    plan = Plan(reader.shard_sizes, 60, seed=0)
    for epoch in range(40):
        for batch in training_batches(reader, plan, epoch, 0, 0, 1, LoaderOptions(3, 4, torch.device("cuda"))):
            batch.images.sum()
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] - reserved[4] < 8 * 2**20  # a stream of its own for each epoch would take 2 MB each


def test_an_image_is_augmented_on_the_gpu_as_on_the_cpu():
    images, positions = smooth_images(64), torch.arange(1000, 1064)
    augment = Augment(cutout=0.3, mixup_prob=0.4, cutmix_prob=0.4)
    assert torch.equal(uniforms(7, 3, positions, 12), uniforms(7, 3, positions.cuda(), 12).cpu())
    here = training_view(images, positions, 3, 7, augment, 48)
    there = training_view(images.cuda(), positions.cuda(), 3, 7, augment, 48)
    # A pixel at the rim of the cut-out square may fall on its other side by rounding.
    assert ((here - there.cpu()).abs() > 1e-3).float().mean() < 1e-4
    here, of_here = mix(here, positions, 3, 7, augment)
    there, of_there = mix(there, positions.cuda(), 3, 7, augment)
    assert ((here - there.cpu()).abs() > 1e-3).float().mean() < 1e-4
    assert torch.allclose(of_here, of_there.cpu(), atol=1e-4)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_run_that_is_killed_on_a_gpu_goes_on(tiny, tmp_path, precision):
    settings = ("--config", tiny, "--run.precision", precision, *SAVING)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    code, out, error = run("driven", *settings, "--run.folder", undisturbed)
    assert code == 0, error
    assert f"1 process on {torch.cuda.get_device_name()}" in out
    code, _, _ = run("driven", *settings, "--run.folder", killed, disturb="die@8")
    assert code == -signal.SIGKILL
    code, out, error = run("driven", *settings, "--run.folder", killed)
    assert code == 0, error
    assert f"continuing {killed} at epoch 2, step 7" in out
    assert samples(killed) == samples(undisturbed)
    assert scaler(killed) == scaler(undisturbed)
    assert (scaler(killed) is not None) == (precision == "fp16")
    assert state(killed)["status"] == "finished"


def test_an_evaluation_on_a_gpu_gives_the_same_bytes_again(tiny, tmp_path):
    code, _, error = run("train", "--config", tiny)
    assert code == 0, error
    code, _, error = run("evaluate", tmp_path / "run", "--out", tmp_path / "again")
    assert code == 0, error
    first, again = ((tmp_path / folder / "predictions.csv").read_bytes() for folder in ("run", "again"))
    assert first == again


def test_every_setting_of_a_recipe_runs_on_a_gpu(tiny, tmp_path):
    code, _, error = run("train", "--config", tiny, *ALL_OF_IT)
    assert code == 0, error
    kept = list((tmp_path / "run" / "checkpoints").iterdir())
    assert kept
    assert all(find_corruption(folder) is None for folder in kept)


def test_two_deterministic_runs_on_a_gpu_end_with_the_same_bits(tiny, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        settings = ("--run.deterministic", "true", "--run.precision", "auto", "--run.folder", folder)
        code, out, error = run("train", "--config", tiny, *ALL_OF_IT, *settings)
        assert code == 0, error
        assert ", deterministic, torch" in out
    assert_equal_weights(*(weights(folder) for folder in folders))
    assert deterministic_log(folders[0]) == deterministic_log(folders[1])
    (first, again) = ((folder / "predictions.csv").read_bytes() for folder in folders)
    assert first == again


def test_each_epoch_says_the_peak_of_the_gpus_memory(tiny, tmp_path):
    code, _, error = run("train", "--config", tiny)
    assert code == 0, error
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    peaks = [entry["peak_gpu_bytes"] for entry in entries if entry["kind"] == "epoch"]
    assert len(peaks) == 3
    assert all(10**6 < peak < torch.cuda.get_device_properties(0).total_memory for peak in peaks)


def samples(folder: Path) -> list[tuple[int, str]]:
    """Which samples were trained on, interval by interval."""
    return [(line["step"], line["samples"]) for line in deterministic_log(folder) if "samples" in line]


def scaler(folder: Path) -> dict | None:
    """The loss scaler's state in the newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"))
    return torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)["scaler"]
