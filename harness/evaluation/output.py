"""Predictions of images without known labels, as a table that people and programs read.

In: probabilities, names, thresholds. Out: rows, and a CSV, JSON lines or Parquet file of them. Invariants: a row for each image, in the
order in which they were asked for; an image that could not be read has its reason and no numbers; a file appears whole or not at all.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.evaluation.calibration import Prior, change_prior, with_temperature
from harness.evaluation.results import Predictions, classes_of
from shards.files import write_atomically

SUFFIXES = (".csv", ".jsonl", ".parquet")
DIGITS = 7  # of a probability, as in predictions.csv


def output_rows(
    names: Sequence[str],
    predictions: Predictions,
    classes: tuple[str, ...],
    problems: dict[int, str],
    points: Sequence[dict] = (),
    temperature: float | None = None,
    prior: Prior | None = None,
) -> pd.DataFrame:
    """A row for each image: image, prediction, spread, `p_CLASS`, `is_POSITIVE` of each operating point, error.

    Args:
        names: of the N images. predictions: of all of them. problems: place of an image -> why it could not be read.
        points: operating points, as in `Results`; they are applied to the probabilities as evaluated, before temperature and prior.
        temperature, prior: what the probabilities are changed by, if at all.
    """
    evaluated = predictions.tta_probs
    shown = evaluated if temperature is None else with_temperature(evaluated, temperature)
    shown = shown if prior is None else change_prior(shown, prior)
    is_read = ~np.isin(np.arange(len(names)), list(problems))
    rows: dict[str, Any] = {
        "image": list(names),
        "prediction": np.where(is_read, np.array(classes)[shown.argmax(1)], ""),
        "spread": np.where(is_read, predictions.tta_std, np.nan),
    }
    rows |= {f"p_{name}": np.where(is_read, shown[:, number], np.nan) for number, name in enumerate(classes)}
    for point in points:
        positive = [classes.index(name) for name in classes_of(point["positive"], classes)]
        is_positive = evaluated[:, positive].sum(1) >= point["threshold"]
        rows[f"is_{point['positive']}"] = np.where(is_read, np.where(is_positive, "true", "false"), "")
    rows["error"] = [problems.get(place, "") for place in range(len(names))]
    return pd.DataFrame(rows)


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written as asked, before anything is computed.

    Raises:
        ValueError: another ending than .csv, .jsonl or .parquet, or Parquet without pyarrow.
        FileExistsError: it exists. FileNotFoundError: its folder does not.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(SUFFIXES)}. Got {path.name}.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give --out the name of a file.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Give --overwrite to replace it, or another --out.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} of --out does not exist. Make it, or name another.")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401 - pandas needs it  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"{path.name} needs pyarrow: pip install pyarrow. Or write a .csv.") from error


def write_rows(rows: pd.DataFrame, path: Path) -> None:
    """Write rows by the file's ending.

    Raises:
        OSError: it cannot be written; a file that was there is as it was.
    """
    if path.suffix.lower() == ".parquet":
        buffer = io.BytesIO()
        rows.to_parquet(buffer, index=False)
        data = buffer.getvalue()
    elif path.suffix.lower() == ".csv":
        text = rows.copy()
        for name in numbers_of(rows):
            digits = 4 if name == "spread" else DIGITS
            text[name] = [
                "" if np.isnan(value) else f"{value:.{digits}{'f' if digits == 4 else 'g'}}" for value in rows[name]
            ]
        data = text.to_csv(index=False, lineterminator="\n").encode()
    else:
        records = rows.astype(object).where(rows.notna(), None).to_dict("records")
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    write_atomically(path, data)


def numbers_of(rows: pd.DataFrame) -> list[str]:
    """The columns of numbers."""
    return ["spread", *(name for name in rows if str(name).startswith("p_"))]
