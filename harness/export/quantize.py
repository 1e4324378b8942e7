"""An ONNX file in whole numbers of 8 bits.

In: an exported ONNX file and training images. Out: a smaller, faster file that answers a little otherwise. Invariants: only
the model's layers are quantised; what comes before it (the resize) and after it (the softmax) stays in floating point.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from harness.export.graph import INPUT
from shards.files import write_atomically

NAME = "model-int8.onnx"
IMAGES = 200  # that the ranges of activations are taken from
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter writes the module that an operator is of


def quantize(path: Path, out: Path, inputs: Iterator[np.ndarray]) -> None:
    """Write a statically quantised copy (QDQ, weights by channel) of an exported file.

    Weights have 7 bits of the 8: without them, the sums of CPUs that have no VNNI overflow, silently.

    Args:
        path: as from `write_onnx`. inputs: batches of the file's inputs, of training images.
    """
    import onnx  # pyright: ignore[reportMissingImports] - an extra
    from onnxruntime import quantization  # pyright: ignore[reportMissingImports] - an extra

    class Images(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(inputs, None)
            return None if batch is None else {INPUT: batch}

    around = [node.name for node in onnx.load(str(path)).graph.node if not _is_of_model(node)]
    logging.getLogger().addFilter(_is_no_advice)
    try:
        quantization.quantize_static(
            str(path),
            str(out),
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=around,
        )
    finally:
        logging.getLogger().removeFilter(_is_no_advice)


def describe(path: Path, words: dict[str, str]) -> None:
    """Give a quantised file its metadata, and have it checked.

    Its operators are sorted again: onnxruntime's quantiser does not see what the branches of an `If` need from outside them.
    """
    import onnx  # pyright: ignore[reportMissingImports] - an extra
    import onnx_ir  # pyright: ignore[reportMissingImports] - comes with onnxscript

    quantised = onnx_ir.load(str(path))
    quantised.graph.sort()
    quantised.metadata_props.clear()
    quantised.metadata_props.update(words)
    sorted_again = onnx_ir.serde.serialize_model(
        quantised
    ).SerializeToString()  # before its file is replaced: it is mapped
    write_atomically(path, sorted_again)
    onnx.checker.check_model(str(path), full_check=True)


def _is_of_model(node) -> bool:
    """Whether an operator is of the classifier's `model`, by the modules that torch wrote down for it."""
    return any(entry.key == SCOPES and "'model'" in entry.value for entry in node.metadata_props)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """Onnxruntime advises to fuse layers first, which torch's exporter has done, and says where a weight has no channels."""
    said = record.getMessage()
    return "pre-processing before quantization" not in said and "out-of-range for weight" not in said
