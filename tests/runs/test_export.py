"""Exports of a real run: what each file answers, what it says of itself, and what is refused."""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from harness.data.augment import plain_view
from harness.evaluation.calibration import fit_temperature, with_temperature
from harness.evaluation.metrics import paired_differences
from harness.export import example, formats, scoring
from harness.export import export as export_module
from harness.export.card import model_card
from harness.export.trained import Trained, load_trained, metadata
from harness.run.recovery import find_best
from launch.export import main
from shards.files import write_durably
from shards.image import fit, open_rgb
from shards.reader import SplitReader
from support.processes import ROOT, environment

README = ROOT / "launch" / "README.md"
SAME = 1e-4  # probabilities from the same levels of grey
NEAR = 0.02  # after a resize: some levels differ by 1, and the model of these tests is sensitive (see `decided_run`)
HAS_ONNX = importlib.util.find_spec("onnxruntime") is not None


def needs_onnx(test):
    """Slow, so that they run where .ci/run has installed the extra."""
    return pytest.mark.slow(pytest.mark.skipif(not HAS_ONNX, reason='pip install -e ".[export]"')(test))


def export(run: Path, kind: str, out: Path, *more) -> str:
    """Export, which must end well; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([str(run), "--format", kind, "--out", str(out), *map(str, more)])
    assert code == 0, printed.getvalue()
    return printed.getvalue()


@pytest.fixture(scope="module")
def decided_run(finished_run, tmp_path_factory) -> Path:
    """The run, as if it had learned for longer: its answers differ from image to image, so that a comparison means something."""
    run = tmp_path_factory.mktemp("decided") / "run"
    shutil.copytree(finished_run, run)
    trained, folder = load_trained(run, None), find_best(run).folder
    views = scoring.plain_views(trained, stored(trained, "train", 48))
    for module in trained.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # few steps have not moved their statistics to those of the images
            module.momentum = None
            module.reset_running_stats()
    labels, _ = scoring.labels_and_groups(SplitReader(trained.dataset, "val"))
    known = scoring.plain_views(trained, stored(trained, "val", len(labels)))
    with torch.no_grad():
        trained.model.train()(views)
        head, trained.model.fc = trained.model.fc, torch.nn.Identity()
        features, trained.model.fc = trained.model.eval()(known).double(), head
        inner = features.T @ features + torch.eye(features.shape[1]) * features.pow(2).mean()
        learned = torch.from_numpy(np.where(np.arange(len(labels)) < 2, labels[::-1], labels))  # two of them wrong
        wanted = torch.nn.functional.one_hot(learned, len(trained.classes)).double()
        head.weight.copy_(torch.linalg.solve(inner, features.T @ (wanted - wanted.mean(0))).T)  # it knows them a little
        logits = trained.model(views)
        scale = 0.5 / logits.std(0).max()
        trained.model.fc.weight *= scale
        trained.model.fc.bias.copy_(scale * (trained.model.fc.bias - logits.mean(0)))
    weights = trained.model.state_dict()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model.safetensors"] = write_durably(folder / "model.safetensors", save(weights))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["calibration"]["temperature"] = 1.5
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


@pytest.fixture(scope="module")
def onnx(decided_run, tmp_path_factory) -> tuple[Path, str]:
    """A folder with model.onnx and model-int8.onnx, and what was printed."""
    out = tmp_path_factory.mktemp("onnx") / "export"
    return out, export(decided_run, "onnx", out, "--int8")


@pytest.fixture(scope="module")
def trained(decided_run) -> Trained:
    """The run with the temperature of its center view, which is not that of its average over views."""
    trained = load_trained(decided_run, None)
    reader = SplitReader(trained.dataset, "val")
    labels, _ = scoring.labels_and_groups(reader)
    probabilities = scoring.predict_images(scoring.harness_predict(trained), reader, np.arange(len(labels)))
    return replace(trained, temperature=fit_temperature(probabilities, labels))


def stored(trained: Trained, split: str = "test", n: int = 8) -> np.ndarray:
    (pixels,) = scoring.stored_images(SplitReader(trained.dataset, split), np.arange(n), n)
    return pixels


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with a little noise, as a photograph has them."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(coarse) + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def answer(trained: Trained, data: bytes) -> np.ndarray:
    """The harness's probabilities of an image file: opened and fitted as packing does, without the JPEG in between."""
    image = fit(open_rgb(data, "a test image"), trained.stored, trained.dataset.description.fit)
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        view = plain_view(images, trained.config.augment, trained.results.image_size)
        return with_temperature(trained.model(view).softmax(1).numpy(), trained.temperature)[0]


def test_the_answers_that_are_compared_differ(trained):
    answers = scoring.harness_predict(trained)(stored(trained))
    assert trained.temperature not in (1, trained.results.calibration["temperature"])
    assert answers.std(0).max() > 0.05
    assert answers.max() < 0.999


@needs_onnx
@pytest.mark.parametrize("batch", [1, 8])
def test_the_onnx_file_answers_stored_images_as_the_harness_does(onnx, trained, batch):
    pixels = stored(trained, n=batch)
    found = formats.open_onnx(onnx[0] / "model.onnx")(pixels)
    assert found.dtype == np.float32
    assert np.abs(found - scoring.harness_predict(trained)(pixels)).max() < SAME
    assert "largest difference of a probability" in onnx[1]
    assert re.search(
        r"model\.onnx: [\d.]+ MB; [\d.]+ ms for 1, [\d.]+ ms for 32 images of 48x36 on \d+ CPU cores", onnx[1]
    )


@needs_onnx
@pytest.mark.parametrize("size", [(48, 36), (200, 100), (61, 97), (30, 20), (1, 1)])
def test_the_onnx_file_takes_images_of_any_size(onnx, trained, size):
    image = picture(*size)
    file = io.BytesIO()
    image.save(file, "PNG")
    found = formats.open_onnx(onnx[0] / "model.onnx")(np.asarray(image)[None])
    assert np.abs(found[0] - answer(trained, file.getvalue())).max() < NEAR


@needs_onnx
def test_the_onnx_file_says_what_it_is(onnx, trained, decided_run):
    import onnx as package

    for name in ("model.onnx", "model-int8.onnx"):
        model = package.load(str(onnx[0] / name))
        package.checker.check_model(model, full_check=True)
        words = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(words["classes"]) == list(trained.classes)
        assert json.loads(words["temperature"]) == trained.temperature != trained.results.calibration["temperature"]
        assert json.loads(words["stored_size"]) == [48, 36]
        assert words["fit"] == "cover"
        assert words["dataset"] == trained.dataset.fingerprint
        assert (
            words["weights_sha256"]
            == json.loads((find_best(decided_run).folder / "manifest.json").read_text())["model.safetensors"]
        )
        points = json.loads(words["thresholds"])
        assert [point["positive"] for point in points] == [
            point["positive"] for point in trained.results.operating_points
        ]
        assert all(0 <= point["threshold"] <= 1 for point in points)


@needs_onnx
def test_a_threshold_of_the_file_finds_the_wanted_share_of_validation(onnx, trained):
    reader = SplitReader(trained.dataset, "val")
    labels, _ = scoring.labels_and_groups(reader)
    session = formats.open_onnx(onnx[0] / "model.onnx")
    found = scoring.predict_images(session, reader, np.arange(len(labels)))
    words = metadata(trained, "inside", scoring.choose_thresholds(trained, found, labels))
    for point in json.loads(words["thresholds"]):
        numbers = [trained.classes.index(name) for name in point["positive"].split("+")]
        is_positive = np.isin(labels, numbers)
        assert (found[is_positive][:, numbers].sum(1) >= point["threshold"]).mean() >= point["wanted_sensitivity"]


@needs_onnx
def test_the_int8_file_is_smaller_and_says_what_it_costs(onnx, trained):
    folder, printed = onnx
    assert (folder / "model-int8.onnx").stat().st_size < 0.6 * (folder / "model.onnx").stat().st_size
    reader = SplitReader(trained.dataset, "val")
    labels, groups = scoring.labels_and_groups(reader)
    asked = [
        scoring.predict_images(predict, reader, np.arange(len(labels)))
        for predict in (formats.open_onnx(folder / "model.onnx"), formats.open_onnx(folder / "model-int8.onnx"))
    ]
    assert np.isfinite(asked[1]).all()
    assert np.abs(asked[0] - asked[1]).max() > SAME
    name = "balanced_accuracy"
    cost = paired_differences([asked[0]], [asked[1]], labels, trained.classes, groups, (name,))[name]
    low, high = cost["interval"]
    wanted = f"{cost['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
    assert f"balanced accuracy on the validation split {wanted}, paired 95 % interval by lesion" in printed
    assert wanted in (folder / "README.md").read_text(encoding="utf-8")


@needs_onnx
def test_the_model_card_has_the_values_of_the_run(onnx, trained):
    card = (onnx[0] / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["pipeline_tag"], front["library_name"]) == ("image-classification", "onnx")
    measured = {entry["name"]: entry["value"] for entry in front["model-index"][0]["results"][0]["metrics"]}
    center = trained.results.center
    assert measured["accuracy, center view"] == pytest.approx(center["accuracy"], abs=1e-4)
    low, high = center["intervals"]["balanced_accuracy"]
    assert f"| balanced accuracy | {center['balanced_accuracy']:.3f} ({low:.3f} to {high:.3f}) |" in card
    for name in trained.classes:
        assert f"| {name} | {center['per_class'][name]['images']} |" in card
    assert trained.dataset.fingerprint in card
    for point in trained.results.operating_points:
        assert f"| {point['positive']} | {point['wanted_sensitivity']} | 0." in card


def test_the_model_card_of_other_data_says_nothing_of_ham10000(trained):
    other = replace(
        trained.dataset.description,
        source={"name": "cats", "images": 3, "fingerprint": "0"},
        **{"citation": "", "license": "", "group_name": "cat"},
    )
    results = replace(deepcopy(trained.results), citation="", license="", group_name="cat")
    results.center["per_class"]["a|b"] = dict(results.center["per_class"]["mel"])
    results.center["intervals"]["per_class"]["a|b"] = dict(results.center["intervals"]["per_class"]["mel"])
    trained = replace(trained, dataset=replace(trained.dataset, description=other), results=results)
    card = model_card(trained, metadata(trained, "inside", []), "onnx", [])
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    assert "cats" in card
    for word in ("HAM10000", "ViDIR", "Tschandl", "dermatoscop"):
        assert word.lower() not in card.lower()
    assert r"| a\|b |" in card


@needs_onnx
def test_views_are_the_input_where_preprocessing_is_outside(trained, decided_run, tmp_path):
    export(decided_run, "onnx", tmp_path / "out", "--preprocessing", "outside", "--opset", 18)
    import onnx as package

    pixels = stored(trained)
    views = scoring.plain_views(trained, pixels).numpy()
    found = formats.open_onnx(tmp_path / "out" / "model.onnx")(views)
    assert np.abs(found - scoring.harness_predict(trained)(pixels)).max() < SAME
    assert package.load(str(tmp_path / "out" / "model.onnx")).opset_import[0].version == 18


@pytest.mark.slow
def test_the_program_of_torch_export_takes_any_batch_and_size_and_says_what_it_is(trained, decided_run, tmp_path):
    export(decided_run, "torch", tmp_path / "out")
    words = {"metadata.json": ""}
    program = torch.export.load(str(tmp_path / "out" / "model.pt2"), extra_files=words).module()
    assert json.loads(json.loads(words["metadata.json"])["classes"]) == list(trained.classes)
    pixels = stored(trained)
    for n in (1, 8):
        found = program(torch.from_numpy(pixels[:n])).detach().numpy()
        assert np.abs(found - scoring.harness_predict(trained)(pixels[:n])).max() < SAME
    image = picture(61, 97)
    file = io.BytesIO()
    image.save(file, "PNG")
    found = program(torch.from_numpy(np.array(image)[None])).detach().numpy()
    assert np.abs(found[0] - answer(trained, file.getvalue())).max() < NEAR


def test_safetensors_hold_the_librarys_names_and_a_config(trained, decided_run, tmp_path):
    printed = export(decided_run, "safetensors", tmp_path / "out", "--temperature", "off")
    assert "equal classes 100.0%" in printed
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == trained.model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.model.state_dict().items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "shufflenet_v2_x0_5"
    assert config["label_names"] == list(trained.classes)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["temperature"]) == 1
        assert file.metadata()["dataset"] == trained.dataset.fingerprint


def test_a_file_that_answers_otherwise_is_deleted(decided_run, tmp_path, monkeypatch, capsys):
    write = formats.write_safetensors

    def damaged(trained, path, words):
        model = deepcopy(trained.model)
        model.fc.bias += torch.linspace(0, 0.1, len(trained.classes))
        write(replace(trained, model=model), path, words)

    monkeypatch.setattr(formats, "write_safetensors", damaged)
    assert main([str(decided_run), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 1
    assert "answers otherwise than the harness" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_there_is_replaced_only_where_asked(decided_run, tmp_path, capsys):
    words = [str(decided_run), "--format", "safetensors", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main([*words, "--overwrite"]) == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_do_not_fill_one_folder_at_once(decided_run, tmp_path, monkeypatch, capsys):
    """The second one is refused, and the first one ends as if alone."""
    words = [str(decided_run), "--format", "safetensors", "--out", str(tmp_path / "out")]
    write = formats.write_safetensors

    def meanwhile(*arguments):
        write(*arguments)
        monkeypatch.setattr(formats, "write_safetensors", write)
        assert main(words) == 1

    monkeypatch.setattr(formats, "write_safetensors", meanwhile)
    assert main(words) == 0
    said = capsys.readouterr()
    assert "Another process exports to" in said.err
    assert "--out" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.safetensors", "README.md"}


def test_an_export_does_not_replace_one_that_ended_meanwhile(decided_run, tmp_path, monkeypatch, capsys):
    words = [str(decided_run), "--format", "safetensors", "--out", str(tmp_path / "out")]
    ask = export_module._ask_harness

    def meanwhile(*arguments):
        (tmp_path / "out").mkdir()
        return ask(*arguments)

    monkeypatch.setattr(export_module, "_ask_harness", meanwhile)
    assert main(words) == 1
    assert "is there already" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_package_is_named_with_what_to_install(decided_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main([str(decided_run), "--format", "onnx", "--out", str(tmp_path / "out")]) == 1
    assert 'pip install -e ".[export]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--format", "torch", "--int8"], "--int8 is of ONNX"),
        (["--format", "torch", "--opset", "18"], "--opset is of ONNX"),
        (["--format", "onnx", "--opset", "7"], "--opset must be 18 or more"),
        (["--format", "safetensors", "--preprocessing", "inside"], "leave out --preprocessing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(decided_run, words, named, capsys):
    assert main([str(decided_run), *words]) == 1
    assert named in capsys.readouterr().err


@pytest.fixture
def copied(decided_run, tmp_path) -> Path:
    """A copy of the run whose dataset was moved away."""
    run = tmp_path / "copy"
    shutil.copytree(decided_run, run)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^  path: .*$", f"  path: {tmp_path / 'gone'}", settings))
    return run


def test_a_dataset_that_was_moved_is_asked_for_and_taken(copied, packed, tmp_path, capsys):
    assert main([str(copied), "--format", "safetensors"]) == 1
    assert "--data FOLDER" in capsys.readouterr().err
    assert main([str(copied), "--format", "safetensors", "--data", str(packed)]) == 0
    assert (copied / "export-safetensors" / "model.safetensors").is_file()
    other = tmp_path / "other"
    shutil.copytree(packed, other)
    description = (other / "dataset.json").read_text()
    (other / "dataset.json").write_text(description.replace('"quality": 9', '"quality": 8'))
    assert main([str(copied), "--format", "torch", "--data", str(other)]) == 1
    assert "dataset.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: (run / "metrics.json").unlink(), "Give the folder of a finished run"),
        (lambda run: next(run.glob("checkpoints/best-*/model.safetensors")).write_bytes(b"no"), "are damaged"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "Train first"),
        (lambda run: (run / "config.yaml").unlink(), "holds no run"),
    ],
)
def test_a_run_that_is_not_finished_or_damaged_is_refused(copied, packed, damage, named, capsys):
    damage(copied)
    assert main([str(copied), "--format", "safetensors", "--data", str(packed)]) == 1
    assert named in capsys.readouterr().err
    assert not (copied / "export-safetensors").exists()


def code_of(markdown: str) -> str:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", markdown, re.DOTALL) if "onnxruntime" in block)
    return code


def pictures(folder: Path) -> list[Path]:
    """Files in several sizes, modes and orientations; none shrinks by 4 or more to 48x36."""
    plain = picture(120, 90)
    alpha = picture(90, 120, 1)
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    paletted = picture(100, 64, 2).quantize(64)
    paletted.info["transparency"] = 3
    saved = {
        **{
            "grey.png": plain.convert("L"),
            "deep.png": Image.fromarray(np.asarray(plain.convert("L"), np.uint16) * 200 + 77),
            "rgba.png": alpha,
            "cmyk.jpg": plain.convert("CMYK"),
            "palette.png": paletted,
        },
        **{"stored.png": picture(48, 36, 3), "small.png": picture(20, 31, 4), "tall.png": picture(50, 140, 5)},
    }
    for name, image in saved.items():
        image.save(folder / name)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture(110, 70, 6).save(folder / f"turned{turn}.jpg", exif=exif, quality=95)
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))


@needs_onnx
def test_the_readmes_program_uses_the_file_without_the_harness(onnx, trained, tmp_path):
    """Its answers are those of the harness."""
    code = code_of(README.read_text(encoding="utf-8"))
    assert code == code_of(example.ONNX)
    shutil.copy(onnx[0] / "model.onnx", tmp_path)
    blocked = "import sys\nfor name in ('harness', 'shards', 'launch', 'torch'):\n    sys.modules[name] = None\n"
    (tmp_path / "classify.py").write_text(blocked + code)
    files = pictures(tmp_path)
    words = [sys.executable, "-I", str(tmp_path / "classify.py"), *(path.name for path in files)]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert len(lines) == len(files) == 16
    assert np.ptp([answer(trained, path.read_bytes()) for path in files], axis=0).max() > 20 * NEAR
    for path, line in zip(files, lines, strict=True):
        name, predicted, named = line.split(" ", 2)
        wanted, found = answer(trained, path.read_bytes()), np.array(list(json.loads(named).values()))
        assert name == path.name
        assert np.abs(found - wanted).max() < NEAR, name
        assert predicted == trained.classes[found.argmax()]
    n_points = len(trained.results.operating_points)
    assert sum(line.startswith("  mel") for line in done.stdout.splitlines()) == n_points * len(files)
