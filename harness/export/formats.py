"""The files that are written, and how each is opened again: ONNX, torch.export, safetensors.

In: a program or a model, and words about it. Out: one file; a function from its inputs to probabilities. Invariants: a file
is opened from the disk, as its user will, before it is believed; none holds a pickle of ours.
"""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from harness.export.graph import INPUT, OUTPUT, Classifier
from harness.export.trained import Trained
from harness.model.build import TIMM, build_model

FILES = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model.safetensors"}
EXTRA = ("onnx", "onnxscript", "onnxruntime")
WORDS = "metadata.json"  # inside a .pt2
ONE_FILE_BYTES = 2**31 - 2**24  # protobuf's limit, with room for the graph

Run = Callable[[np.ndarray], np.ndarray]  # inputs of the file to probabilities (n, C)


def require_extra() -> None:
    """Refuse to go on without the packages of ONNX.

    Raises:
        ValueError: saying what to install.
    """
    for name in EXTRA:
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--format onnx needs the packages {', '.join(EXTRA)}, and {name} is not there ({error}): "
                'pip install -e ".[export]". Or export with --format torch or safetensors.'
            ) from error


def write_onnx(program: torch.export.ExportedProgram, path: Path, words: dict[str, str], opset: int | None) -> None:
    """Write an ONNX file with metadata, and have it checked.

    Args:
        opset: version of ONNX's operators; None for what torch chooses.

    Raises:
        ValueError: torch cannot translate the program, or not to that opset.
    """
    import onnx  # pyright: ignore[reportMissingImports] - an extra

    try:
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # torch.onnx and onnxscript raise their own kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"torch.onnx cannot translate the model ({type(error).__name__}: {reason}). Try another --opset, or --format torch."
        ) from error
    assert translated is not None  # with dynamo, and without a file
    translated.model.metadata_props.update(words)
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    translated.save(str(path), external_data=n_bytes > ONE_FILE_BYTES)
    onnx.checker.check_model(str(path), full_check=n_bytes <= ONE_FILE_BYTES)
    found = {entry.domain: entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import}
    if opset is not None and found[""] != opset:
        raise ValueError(
            f"torch.onnx wrote opset {found['']} instead of {opset}. Give --opset {found['']}, or leave it out."
        )


def open_onnx(path: Path) -> Run:
    """An ONNX file in onnxruntime, on the CPU."""
    import onnxruntime  # pyright: ignore[reportMissingImports] - an extra

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: np.ndarray) -> np.ndarray:
        (probabilities,) = session.run([OUTPUT], {INPUT: inputs})
        return probabilities

    return run


def write_torch(program: torch.export.ExportedProgram, path: Path, words: dict[str, str]) -> None:
    """Write a program of torch.export, with metadata.json among its extra files."""
    torch.export.save(program, str(path), extra_files={WORDS: json.dumps(words, ensure_ascii=False)})


def open_torch(path: Path) -> Run:
    """A program of torch.export."""
    return _without_gradients(torch.export.load(str(path)).module())


def write_safetensors(trained: Trained, path: Path, words: dict[str, str]) -> None:
    """Write the weights under the model library's own names, and a config.json beside them.

    The config is timm's where the model is timm's: `timm.create_model("local-dir:FOLDER", pretrained=True)` takes the folder.
    """
    tensors = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    path.write_bytes(save(tensors, metadata=words))
    (mean, std), size = trained.config.augment.normalization, trained.results.image_size
    content = {
        "architecture": trained.name.removeprefix(TIMM),
        "library": "timm" if trained.name.startswith(TIMM) else "torchvision",
        "num_classes": len(trained.classes),
        "label_names": list(trained.classes),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "num_classes": len(trained.classes),
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "license": words["license"],
        },
        "dermharness": words,
    }
    path.with_name("config.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def open_safetensors(trained: Trained, path: Path) -> Run:
    """The model, built anew, with the weights of the file: normalised views to probabilities."""
    model = build_model(trained.name, len(trained.classes))
    model.load_state_dict(load_file(path))
    return _without_gradients(Classifier(model, None, trained.temperature).eval())


def _without_gradients(module: torch.nn.Module) -> Run:
    @torch.no_grad()
    def run(inputs: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(inputs)).numpy()

    return run
