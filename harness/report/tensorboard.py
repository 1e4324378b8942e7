"""The results of a run in TensorBoard.

In: the files of a finished run's folder. Out: events beside those of its training. What stays true: showing them again
replaces what was there.
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from harness.config import flat, load_config
from harness.evaluation.metrics import SUMMARY_METRICS
from harness.report.page import read_results


def board_results(folder: Path, plots: dict[str, bytes]) -> None:
    """Show the results of a finished run in TensorBoard: figures, plots, PR curves, settings with final figures.

    They stand one step behind the last of training.

    Args:
        plots: PNG by name, as from `report.draw_results`.
    """
    metrics, rows = read_results(folder)
    scores, step = metrics["tta"], json.loads((folder / "state.json").read_text())["step"] + 1
    figures = {f"result/{name}": scores[name] for name in SUMMARY_METRICS if scores[name] is not None}
    with SummaryWriter(str(folder / "tensorboard"), purge_step=step) as board:
        for name, value in figures.items():
            board.add_scalar(name, value, step)
        for name, png in plots.items():
            with Image.open(io.BytesIO(png)) as picture:
                board.add_image(f"result/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        for label in scores["per_class"]:
            truth, found = (rows["label"] == label).to_numpy(), rows[f"p_{label}"].to_numpy()
            board.add_pr_curve(f"result/{label}", truth, found, step)
        settings = {key: str(value) for key, value in flat(load_config(folder / "config.yaml")).items()}
        board.add_hparams(
            settings,
            {name.replace("result", "final"): value for name, value in figures.items()},
            run_name=".",
            global_step=step,
        )
