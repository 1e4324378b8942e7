"""The story of an export: load, write, open again, compare, keep or refuse.

In: a finished run. Out: a folder with the exported file and its model card. Invariants: the folder takes its name only when
everything in it was checked; a file that answers otherwise than the harness is not kept.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from harness.evaluation.calibration import fit_temperature, with_temperature
from harness.evaluation.metrics import paired_differences
from harness.export import formats, quantize, scoring
from harness.export.card import Written, describe_cost, model_card
from harness.export.graph import Classifier, Preprocessing, trace
from harness.export.trained import Trained, load_trained, metadata
from harness.run.checkpoint import put_in_place, temporary_of
from harness.run.console import LOGGER
from shards.files import sync, usable_cores
from shards.locks import refused_twice
from shards.reader import SplitReader

CARD = "README.md"
OURS = {*formats.FILES.values(), quantize.NAME, "model.onnx.data", "config.json", CARD}
BATCHES = (1, 32)  # that are timed


@dataclass(frozen=True)
class Export:
    """What is asked for.

    kind: onnx, torch or safetensors. preprocessing: inside or outside the graph; none for safetensors, which has no graph.
    int8: a quantised file beside it (onnx). opset: of ONNX; None for torch's choice. calibrated: with a temperature, fitted on the
    center view of the validation split.
    """

    kind: str
    preprocessing: str
    int8: bool = False
    opset: int | None = None
    calibrated: bool = True


@dataclass(frozen=True)
class Answers:
    """The validation split and what the harness answers to it.

    places: (n,) in stored order, of the images that were predicted. probabilities: (n, C) of these. labels, groups: (N,).
    """

    reader: SplitReader
    places: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


def export_run(run: Path, out: Path, wanted: Export, data: Path | str | None = None, overwrite: bool = False) -> None:
    """Export a finished run's best weights into a folder.

    Args:
        data: where the run's dataset is now; None for where its settings have it. overwrite: whether an export that is there
            may be replaced.

    Raises:
        FileNotFoundError, ValueError: what is missing, damaged, or cannot be exported, with what to do.
        FileExistsError: `out` is there.
    """
    if wanted.kind == "onnx":
        formats.require_extra()
    out = out.resolve()  # of a link, where it leads to
    _refuse_existing(out, overwrite)
    trained, answers = _ask_harness(load_trained(run, data), wanted)
    everything = len(answers.places) == len(answers.labels)
    thresholds = scoring.choose_thresholds(trained, answers.probabilities, answers.labels) if everything else []
    words = metadata(trained, wanted.preprocessing, thresholds)
    with _filled(out) as folder:
        _refuse_existing(out, overwrite)  # another export may have ended since
        path = folder / formats.FILES[wanted.kind]
        opened = _write(trained, wanted, path, words)
        files = [_check(trained, wanted, answers, path, opened)]
        if wanted.int8:
            files.append(_quantize(trained, wanted, answers, path))
        (folder / CARD).write_text(model_card(trained, words, wanted.kind, files), encoding="utf-8")
    LOGGER.info(f"exported: {out}")


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if out == Path.cwd():
        raise FileExistsError(f"{out} is the folder you are in. Give a new folder inside it: --out FOLDER")
    if not overwrite:
        raise FileExistsError(
            f"{out} is there already. Replace it with --overwrite, or name another folder: --out FOLDER"
        )
    others = (
        ["it is no folder"]
        if not out.is_dir()
        else sorted(path.name for path in out.iterdir() if path.name not in OURS)
    )
    if others:
        raise FileExistsError(
            f"--overwrite replaces a whole folder, and {out} is none that an export wrote ({', '.join(others[:3])}). "
            "Name another: --out FOLDER"
        )


@contextmanager
def _filled(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name, and the place of the one before it, when the block ends well.

    Raises:
        BlockingIOError: another process fills it.
    """
    temporary = temporary_of(out)
    error = f"Another process exports to {out} at this moment. Let it end, or name another folder: --out FOLDER"
    with refused_twice(out.with_name(f".lock-{out.name}"), error):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for path in temporary.iterdir():
                sync(path)
            put_in_place(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _ask_harness(trained: Trained, wanted: Export) -> tuple[Trained, Answers]:
    """The run with its temperature, and the harness's answers with it: to a sample where nothing needs all images."""
    reader = SplitReader(trained.dataset, "val")
    labels, groups = scoring.labels_and_groups(reader)
    needs_all = wanted.calibrated or wanted.int8 or trained.results.operating_points
    places = np.arange(len(labels)) if needs_all else scoring.spread(len(labels), scoring.SAMPLE)
    LOGGER.info(
        f"{trained.name} of {trained.weights.folder}: predicting {len(places)} validation images with the harness"
    )
    probabilities = scoring.predict_images(scoring.harness_predict(trained), reader, places)
    if wanted.calibrated:
        trained = replace(trained, temperature=fit_temperature(probabilities, labels))
        probabilities = with_temperature(probabilities, trained.temperature)
    return trained, Answers(reader, places, probabilities, labels, groups)


def _write(trained: Trained, wanted: Export, path: Path, words: dict[str, str]) -> formats.Run:
    """Write the file, and open it again."""
    if wanted.kind == "safetensors":
        formats.write_safetensors(trained, path, words)
        return formats.open_safetensors(trained, path)
    preprocessing, size = None, trained.results.image_size
    example = torch.zeros(2, 3, size, size)
    if wanted.preprocessing == "inside":
        fit = trained.dataset.description.fit
        preprocessing = Preprocessing(trained.stored, fit, trained.config.augment, size)
        width, height = trained.stored
        example = torch.zeros(
            2, height + 1, width + 2, 3, dtype=torch.uint8
        )  # three sides that differ: none is tied to another
    program = trace(Classifier(trained.model, preprocessing, trained.temperature), example, trained.name)
    if wanted.kind == "torch":
        formats.write_torch(program, path, words)
        return formats.open_torch(path)
    formats.write_onnx(program, path, words, wanted.opset)
    return formats.open_onnx(path)


def _check(trained: Trained, wanted: Export, answers: Answers, path: Path, opened: formats.Run) -> Written:
    """Compare a file with the harness, and time it.

    Raises:
        ValueError: it answers otherwise.
    """
    sample = scoring.spread(len(answers.places), scoring.SAMPLE)
    predict = _on_stored(trained, wanted, opened)
    found = scoring.predict_images(predict, answers.reader, answers.places[sample])
    parity = scoring.compare(found, answers.probabilities[sample])
    LOGGER.info(f"{path.name} beside the harness: {_describe(parity)}")
    if not parity.difference <= scoring.LIMIT:
        raise ValueError(
            f"{path.name} answers otherwise than the harness: a probability differs by {parity.difference:.2g}, and "
            f"{scoring.LIMIT:g} is allowed. It was deleted. Try another --opset or --format."
        )
    return _measured(trained, wanted, answers, path, opened, parity)


def _quantize(trained: Trained, wanted: Export, answers: Answers, path: Path) -> Written:
    """Write the int8 file beside the other, and say what it costs."""
    out, training = path.with_name(quantize.NAME), SplitReader(trained.dataset, "train")
    places = scoring.spread(sum(training.shard_sizes), quantize.IMAGES)
    LOGGER.info(f"{out.name}: ranges of activations from {len(places)} training images")
    prepare = _preparation(trained, wanted)
    quantize.quantize(path, out, (prepare(pixels) for pixels in scoring.stored_images(training, places)))
    opened = formats.open_onnx(out)
    found = scoring.predict_images(_on_stored(trained, wanted, opened), answers.reader, answers.places)
    thresholds = scoring.choose_thresholds(trained, found, answers.labels)  # of its own probabilities
    quantize.describe(out, metadata(trained, wanted.preprocessing, thresholds))
    name, parity = "balanced_accuracy", scoring.compare(found, answers.probabilities)
    both = [answers.probabilities], [found]
    cost = paired_differences(*both, answers.labels, trained.classes, answers.groups, (name,))[name]
    LOGGER.info(
        f"{out.name} beside the harness: {_describe(parity)}; balanced accuracy on the validation split {describe_cost(cost)}, "
        f"paired 95 % interval by {trained.dataset.group_name}"
    )
    return _measured(trained, wanted, answers, out, opened, parity, cost)


def _preparation(trained: Trained, wanted: Export) -> Callable[[np.ndarray], np.ndarray]:
    """From stored images to the inputs of the file."""
    if wanted.preprocessing == "inside":
        return lambda pixels: pixels
    return lambda pixels: scoring.plain_views(trained, pixels).numpy()


def _on_stored(trained: Trained, wanted: Export, opened: formats.Run) -> scoring.Predict:
    prepare = _preparation(trained, wanted)
    return lambda pixels: opened(prepare(pixels))


def _measured(
    trained: Trained,
    wanted: Export,
    answers: Answers,
    path: Path,
    opened: formats.Run,
    parity: scoring.Parity,
    cost: dict | None = None,
) -> Written:
    """Size and speed of a file that is kept."""
    n_bytes, latency = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")), {}
    for n in BATCHES:
        places = np.arange(n) % len(answers.labels)
        (pixels,) = scoring.stored_images(answers.reader, places, n)
        latency[n] = scoring.latency_ms(opened, _preparation(trained, wanted)(pixels))
    width, height = trained.stored
    of_images = f"images of {width}x{height}" if wanted.preprocessing == "inside" else "views"
    times = ", ".join(f"{ms:.1f} ms for {n}" for n, ms in latency.items())
    LOGGER.info(f"{path.name}: {n_bytes / 1e6:.1f} MB; {times} {of_images} on {usable_cores()} CPU cores")
    return Written(path.name, n_bytes, parity, latency, cost)


def _describe(parity: scoring.Parity) -> str:
    return (
        f"{parity.images} validation images, largest difference of a probability {parity.difference:.1e}, equal classes "
        f"{parity.same_class:.1%}"
    )
