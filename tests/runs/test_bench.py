"""The benchmarks run and print; what they print is never asserted, since machines differ."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from launch.bench import __main__ as bench
from launch.bench.baselines import decode
from launch.bench.remote import check_once, check_pixels
from launch.bench.streamed import stored_samples
from shards.reader import SplitReader
from support.processes import ROOT, environment, launch


def run(tmp_path, *words) -> dict:
    assert bench.main([*map(str, words), "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("name", ["loader", "augment", "step", "train", "run", "evaluate", "resume", "save"])
def test_each_benchmark_runs_on_a_small_dataset(tiny, tmp_path, capsys, name):
    numbers = run(tmp_path, name, "--config", tiny, "--rounds", "1")
    shown = capsys.readouterr().out
    assert all(key in shown for key in numbers)
    assert all(value > 0 for key, value in numbers.items() if "per_s" in key)


def test_packing_is_measured_beside_a_plain_loop(source, tmp_path):
    numbers = run(tmp_path, "pack", "--source", source, "--plain", "10")
    assert numbers["images"] == 84
    assert numbers["ratio_to_plain_pillow"] > 0


def test_the_order_of_many_samples_is_measured_on_real_index_files(tmp_path):
    words = ["--shards", 300, "--shard-samples", 100, "--ranks", 16, "--batch", 4, "--lanes", 4]
    numbers = run(tmp_path, "plan", *words)
    assert numbers["samples"] == 30_000
    assert numbers["shards_of_a_node, 1 lane(s)"] == 300
    assert 75 <= numbers["shards_of_a_node, 4 lane(s)"] <= 152  # 8 of 16 ranks have two of the four lanes


def test_what_cannot_be_measured_or_written_is_said_first(tmp_path, capsys):
    words = ["plan", "--shards", "10", "--shard-samples", "10", "--ranks", "2", "--batch", "20", "--lanes", "1"]
    assert bench.main(words) == 1
    assert "is too short to measure" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main([*words, "--json", str(tmp_path / "none" / "x.json")])
    assert "none does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_are_measured_as_one_and_rank_0_speaks(tiny, tmp_path):
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "launch.bench",
        "step",
        "--config",
        tiny,
        "--rounds",
        "1",
    ]
    words = [sys.executable, *map(str, words), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert (numbers["batch"], numbers["processes"]) == (12, 2)
    assert done.stdout.count("step_images_per_s") == 1
    assert numbers["step_images_per_s"] == pytest.approx(12 / numbers["step_ms"] * 1e3)


def test_planted_copies_are_found_in_a_folder_of_ones_own_images(tmp_path, capsys):
    for number in range(8):
        path = tmp_path / "source" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (150, 200, 3), np.uint8)
        Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)).save(path)
    words = [tmp_path / "source", "--images", 3, "--others", 5, "--kinds", "same bytes,turn 90,flip horizontal"]
    numbers = run(tmp_path, "audit", *words, "--scratch", tmp_path)
    own, *planted = numbers["kinds"]
    assert own["kind"] == "nothing planted"
    assert own["unplanted_per_1000"] == 0
    assert [row["kind"] for row in planted] == ["same bytes", "turn 90", "flip horizontal"]
    assert [row["found"] for row in planted] == [1, 1, 1]
    assert "above_weakest_5_percent" in capsys.readouterr().out
    assert not any(path.is_dir() for path in tmp_path.iterdir() if path.name != "source")  # nothing is left behind


def test_an_unknown_kind_of_change_is_refused_with_those_that_are_known(source, capsys):
    assert bench.main(["audit", str(source), "--kinds", "sepia"]) == 1
    assert "JPEG 20" in capsys.readouterr().err


def test_many_gpus_are_predicted_from_what_the_other_benchmarks_wrote(tiny, packed, tmp_path, capsys):
    words = ["scaling", "--config", tiny, "--link-gb-s", 10, "--network-gb-s", 1, "--storage-mb-s", 100]
    for name in ("step", "loader", "save", "remote"):
        run(tmp_path, name, "--config", tiny, "--rounds", "1")
        (tmp_path / "out.json").rename(tmp_path / f"{name}.json")
        words += [f"--{name}", tmp_path / f"{name}.json"]
    step = json.loads((tmp_path / "step.json").read_text())
    capsys.readouterr()
    numbers = run(tmp_path, *words)
    one, two, *others = numbers["prediction"]
    assert 0 < one["images_per_s_low"] <= one["images_per_s_high"] <= 1 + 12e3 / step["step_ms"]
    assert (one["global_batch"], two["global_batch"]) == (12, 24)
    assert others[-1]["limited_by"] == "images"
    assert f"{step['gradient_bytes'] / 1e6:.1f} MB" in numbers["gradients"]
    assert "step.json" in numbers["step of 12"]
    assert "training split of" in numbers["images"]
    assert "machine" not in numbers  # nothing was measured
    shown = capsys.readouterr().out
    assert all(key in shown for key in numbers)


SCALING = ["scaling", "--step-ms", "20", "--batch", "64", "--model.name", "resnet18", "--images", "7009"]


def test_without_a_network_one_node_is_predicted_and_the_data_sheet_is_named(tmp_path):
    numbers = run(tmp_path, *SCALING, "--gpu", "H200", "--gpus-per-node", "4")
    assert [row["gpus"] for row in numbers["prediction"]] == [1, 2, 4]
    assert "450 GB/s each way" in numbers["link"]
    assert "data sheet of H200" in numbers["link"]
    assert "--network-gb-s" in numbers["more nodes"]


STEP = {"step_ms": 9.0, "augment_ms": 1.0, "batch": 8, "processes": 1, "model": "a", "gradient_bytes": 4, "setting": ""}


@pytest.mark.parametrize(
    ("written", "words", "said"),
    [
        ({}, ["scaling", "--step", "FILE"], "has no 'step_ms'"),
        ({"save_s": 1.0}, ["scaling", "--step", "FILE"], "give it as --save"),
        ({"save_s": 0.0}, [*SCALING, "--gpu", "h100", "--save", "FILE"], "must be above 0"),
        (STEP | {"step_ms": -1.0}, ["scaling", "--step", "FILE"], "must be above 0"),
        (STEP | {"processes": 8}, ["scaling", "--step", "FILE"], "Measure on one"),
        (STEP, ["scaling", "--step", "FILE"], "Give --images N"),
        (STEP, ["scaling", "--step", "FILE", "FILE"], "same batch size"),
        (STEP, [*SCALING, "--step", "FILE"], "needed, once"),
        (STEP, ["scaling", "--images", "9"], "--step-ms with --batch"),
        (STEP, SCALING, "--gpu KIND"),
        (STEP, [*SCALING, "--gpu", "h100", "--storage-mb-s", "9"], "Give --image-kb"),
        (STEP, [*SCALING, "--gpu", "h100", "--loader-gpus", "16"], "a node has 8 GPUs"),
        (STEP, [*SCALING[:5], "--images", "9", "--gpu", "h100"], "Name the model"),
    ],
)
def test_what_a_prediction_lacks_is_said_with_what_to_give(written, words, said, tmp_path, capsys):
    (tmp_path / "file.json").write_text(json.dumps(written))
    assert bench.main([word.replace("FILE", str(tmp_path / "file.json")) for word in words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--gpu", "h900"], "Give --link-gb-s"), (["--link-gb-s", "0"], "above 0"), (["--batch", "-1"], "")],
)
def test_numbers_and_gpus_that_cannot_be_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(["scaling", *words])
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_pipelines_are_compared_on_the_same_images(source, packed, tiny, tmp_path):
    words = ["--source", source, "--config", tiny, "--rounds", "1", "--json", tmp_path / "out.json"]
    done = launch("bench", "compare", *words)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert {"ours", "notebook, 0 workers", "WebDataset + DataLoader, 2 workers"} <= set(numbers)


def test_an_epoch_of_another_package_counts_only_if_each_image_came_once_and_unchanged(dataset):
    samples = stored_samples(SplitReader(dataset, "train"))
    images, keys = torch.stack([decode(data) for data, _, _ in samples]), torch.tensor([key for _, _, key in samples])
    check_pixels("peer", [(images, keys)], samples)
    check_pixels("peer", [(images[part], keys[part]) for part in (slice(5, None), slice(5))], samples)
    with pytest.raises(ValueError, match=f"gave {len(keys)} images, {len(keys) - 1} different ones"):
        check_once("peer", [*keys.tolist()[1:], int(keys[1])], len(keys))
    with pytest.raises(ValueError, match="instead of each of"):
        check_pixels("peer", [(images[1:], keys[1:])], samples)
    with pytest.raises(ValueError, match=f"other pixels for the image {int(keys[1])}"):
        check_pixels("peer", [(images, torch.cat([keys[1:], keys[:1]]))], samples)


def test_a_word_that_means_nothing_is_an_error(capsys):
    with pytest.raises(SystemExit):
        bench.main(["pack", "--source", "x", "--data.path", "y"])
    assert "--data.path" in capsys.readouterr().err
