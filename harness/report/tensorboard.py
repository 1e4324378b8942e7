"""The results of a run in TensorBoard.

In: the files of a finished run's folder. Out: events beside those of its training. Invariants: writing them again replaces
what was there.
"""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from harness.config import Config, flat
from harness.evaluation.metrics import SUMMARY_METRICS
from harness.evaluation.results import Results


def write_tensorboard(
    folder: Path, results: Results, rows: pd.DataFrame, config: Config, plots: dict[str, bytes]
) -> None:
    """Write the results of a finished run for TensorBoard: metrics, plots, PR curves, settings with final metrics.

    They stand one step behind the last of training.

    Args:
        rows: of predictions.csv. plots: PNG by name, as from `page.write_page`.
    """
    metrics = results.tta
    step = json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"] + 1
    defined = {name: metrics[name] for name in SUMMARY_METRICS if metrics[name] is not None}
    with SummaryWriter(str(folder / "tensorboard"), purge_step=step) as writer:
        for name, value in defined.items():
            writer.add_scalar(f"result/{name}", value, step)
        for name, png in plots.items():
            with Image.open(io.BytesIO(png)) as image:
                writer.add_image(f"result/{name}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        for label in metrics["per_class"]:
            is_label, probability = (rows["label"] == label).to_numpy(), rows[f"p_{label}"].to_numpy()
            writer.add_pr_curve(f"result/{label}", is_label, probability, step)
        settings = {key: str(value) for key, value in flat(config).items()}
        final = {f"final/{name}": value for name, value in defined.items()}
        writer.add_hparams(settings, final, run_name=".", global_step=step)
