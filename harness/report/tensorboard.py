"""The results of a run in TensorBoard.

In: the files of a finished run's folder. Out: events beside those of its training. Invariants: writing them again replaces
what was there.
"""

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from harness.config import Config, flat
from harness.evaluation.metrics import SUMMARY_METRICS
from harness.evaluation.results import Results
from shards.shape import misfit, parse_json


def write_tensorboard(
    folder: Path, results: Results, rows: pd.DataFrame, config: Config, plots: dict[str, bytes]
) -> None:
    """Write the results of a finished run for TensorBoard: metrics, plots, PR curves, settings with final metrics.

    They stand one step behind the last of training.

    Args:
        rows: of predictions.csv. plots: PNG by name, as from `page.write_page`.
    """
    metrics = results.tta
    step = _last_step(folder / "state.json") + 1
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
        settings = {key: value if isinstance(value, int | float) else str(value) for key, value in flat(config).items()}
        final = {f"final/{name}": value for name, value in defined.items()}
        writer.add_hparams(settings, final, run_name=".", global_step=step)


def _last_step(path: Path) -> int:
    """How many steps a run made.

    Raises:
        ValueError: its state.json is damaged.
        OSError: it cannot be read.
    """
    try:
        state = parse_json(path.read_bytes())
        problem = misfit(state, {"step": int})
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged ({problem}). Start the run's command again: it writes it anew.")
    return state["step"]
