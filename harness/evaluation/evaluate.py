"""Evaluate weights: predict a split, compute the results, write them.

In: a model with its checkpoint, a split, settings. Out: `Results`, `predictions.csv` and `metrics.json`. Invariants:
the bytes of both files are the same at any world size; where there is a `metrics.json`, the `predictions.csv` beside it
belongs to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from harness.config import Config, load_config
from harness.distributed.world import World
from harness.evaluation.calibration import Prior, class_priors
from harness.evaluation.ensemble import Member, average, gain_of_ensemble, predict_each
from harness.evaluation.predict import never
from harness.evaluation.results import METRICS_FILE, PREDICTIONS_FILE, Predictions, Results, compute_results
from harness.evaluation.trained import TrainedRun
from harness.run.provenance import Checkpoint, Provenance
from harness.run.state import changes, writing
from shards.audit.record import audit_warnings
from shards.description import read_description
from shards.files import write_atomically
from shards.groups import Groups, count_shared, load_groups
from shards.index import Dataset, load, load_table
from shards.leaks import leak_warnings
from shards.reader import SplitReader


@dataclass(frozen=True)
class EvalContext:
    """How the weights that are evaluated came about.

    weights: where they are from. changed_settings: settings that changed in the middle of their training.
    prior: class frequencies that the model's probabilities assume, and those that they are corrected to; None where the models of
    an ensemble assume different ones.
    validation: the split that the temperature and the thresholds are chosen on; None for neither.
    train_groups: that the weights were trained on, of each dataset that they come from.
    """

    weights: Checkpoint
    changed_settings: list[str]
    prior: Prior | None
    validation: SplitReader | None
    train_groups: tuple[Groups, ...]


def evaluate(
    members: Sequence[Member],
    reader: SplitReader,
    world: World,
    folder: Path,
    context: EvalContext,
    stop: Callable[[], bool] = never,
) -> Results | None:
    """Collective: evaluate a split with test-time augmentation, and write predictions.csv and metrics.json.

    Args:
        members: the model with the weights of the context, on the world's device; of several, the average is evaluated, and
            compared with the best of them. reader: of the split that their settings name.
        folder: for the two files. stop: whether this rank was asked to stop.

    Returns:
        the contents of metrics.json, on every rank; None if a rank was asked to stop, and then nothing is written.

    Raises:
        RuntimeError: a sample was lost or predicted twice.
        ValueError: the model's probabilities are not finite.
        OSError: the folder cannot be written.
    """
    config, classes, on_validation = members[0].config, members[0].classes, None
    shared = world.run_on_main(_count_shared, context.validation, reader)
    if context.validation is not None and not shared:  # nothing is tuned on the images that are evaluated
        on_validation = predict_each(members, context.validation, world, stop)
        if on_validation is None:
            return None
    parts = predict_each(members, reader, world, stop)
    if parts is None:
        return None
    predictions = average(parts)

    def save() -> Results:
        samples = pd.concat([load_table(reader.dataset, shard) for shard in reader.shards])
        samples = samples.sort_values("key", ignore_index=True)
        validation = average(on_validation) if on_validation else None
        results = _results(predictions, validation, samples, reader.dataset, config, context, shared)
        if len(members) > 1:
            groups = samples["group"].astype(str).to_numpy()
            results = replace(results, ensemble=gain_of_ensemble(members, parts, on_validation, classes, groups))
        rows = prediction_rows(predictions, samples, classes)
        with writing(folder / PREDICTIONS_FILE):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / METRICS_FILE).unlink(missing_ok=True)  # written last: where it is, both files are whole
            write_atomically(folder / PREDICTIONS_FILE, rows.to_csv(index=False).encode())
        with writing(folder / METRICS_FILE):
            write_atomically(folder / METRICS_FILE, results.to_json().encode())
        return results

    return world.run_on_main(save)


def _count_shared(validation: SplitReader | None, reader: SplitReader) -> int:
    """Groups of a split that are in the validation split, too: all of itself, none of another split of the same dataset."""
    if validation is None:
        return 0
    if validation.dataset.fingerprint == reader.dataset.fingerprint and validation.shards != reader.shards:
        return 0  # as packed: of an image protocol, they may share groups, and no images
    return count_shared(*(load_groups(one.dataset, one.title) for one in (validation, reader)))


def context_of_runs(runs: Sequence[TrainedRun]) -> EvalContext:
    """The context of runs' own weights, from the files of their folders; of several, their training groups together.

    Raises:
        ValueError, OSError: settings or a dataset.json are damaged, of another version, or missing.
    """
    first, weights = runs[0], runs[0].weights
    groups = {run.weights.provenance.dataset: run.weights.provenance.train_groups for run in runs}
    changed = [change for run in runs for change in changes(run.folder)]
    validation = validation_of_run(first) if len(groups) == 1 else None
    return EvalContext(weights, changed, priors_of_runs(runs), validation, tuple(groups.values()))


def validation_of_run(run: TrainedRun) -> SplitReader | None:
    """The validation split that a run was trained with, of the data that are evaluated or of its settings; None if neither has it.

    Raises:
        ConnectionError: remote storage does not answer.
    """
    given, saved = run.config.data, load_config(run.folder / "config.yaml").data.path
    for place in dict.fromkeys((given.path, saved)):
        try:
            dataset = load(place, given.access)
        except ConnectionError:  # results must not depend on the weather
            raise
        except (OSError, ValueError):
            continue
        if dataset.fingerprint == run.weights.provenance.dataset:
            return SplitReader(dataset, "val")
    return None


def priors_of_runs(runs: Sequence[TrainedRun]) -> Prior | None:
    """The first run's `priors_of_run`; None if classes were balanced in the training of some runs and not of others."""
    priors = [priors_of_run(run.folder) for run in runs]
    return priors[0] if len({prior.target_name for prior in priors}) == 1 else None


def priors_of_run(run: Path) -> Prior:
    """Class frequencies that a run's probabilities assume, and those that they are corrected to.

    Raises:
        ValueError, OSError: its settings or its dataset.json are damaged, of another version, or missing.
    """
    counts = read_description(run / "dataset.json").counts
    if not sum(counts.get("train", {}).values()):
        raise ValueError(f"{run / 'dataset.json'} has no training images, so it is of no run. Restore a copy.")
    return class_priors(load_config(run / "config.yaml").optim, counts["train"])


def refuse_unknown_classes(dataset: Dataset, provenance: Provenance) -> None:
    """Refuse a dataset with classes that the model does not know; classes are told apart by their names.

    Raises:
        ValueError: naming them.
    """
    unknown = [name for name in dataset.classes if name not in provenance.classes]
    if unknown:
        raise ValueError(
            f"{dataset.folder} has classes that the model does not know: {', '.join(unknown)}. It knows "
            f"{', '.join(provenance.classes)}. Rename or leave out the others in the source, and pack it again."
        )


def missing_class_warnings(dataset: Dataset, provenance: Provenance) -> list[str]:
    """One sentence if a dataset lacks classes of the model, else nothing."""
    missing = [name for name in provenance.classes if name not in dataset.classes]
    if not missing:
        return []
    return [
        f"the dataset has {len(dataset.classes)} of the model's {len(provenance.classes)} classes; the model chose among all "
        f"of them, and a prediction of {', '.join(missing)} can only be a mistake here"
    ]


def prediction_rows(predictions: Predictions, samples: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """The rows of predictions.csv: key, image id, group, label, prediction, spread over views, then a probability a class.

    Args:
        samples: N rows of the split's tables, in the order of the predictions. classes: C names.
    """
    names = np.array(classes)
    rows = pd.DataFrame(samples[["key", "image_id", "group"]])
    rows["label"], rows["prediction"] = names[predictions.labels], names[predictions.tta_probs.argmax(1)]
    rows["spread"] = [f"{value:.4f}" for value in predictions.tta_std]
    columns = {
        f"p_{name}": [f"{value:.7g}" for value in predictions.tta_probs[:, number]]
        for number, name in enumerate(classes)
    }
    return pd.concat([rows, pd.DataFrame(columns, index=rows.index)], axis=1)


def _results(
    predictions: Predictions,
    on_validation: Predictions | None,
    samples: pd.DataFrame,
    dataset: Dataset,
    config: Config,
    context: EvalContext,
    shared: int,
) -> Results:
    """Results of a split that is predicted; samples: N rows of its tables, in the order of the predictions.

    shared: groups that are in the validation split, too.
    """
    description, provenance = dataset.description, context.weights.provenance
    warnings = [
        *description.warnings,
        *leak_warnings(dataset, config.eval.split, context.train_groups),
        *audit_warnings(dataset, config.eval.split),
        *missing_class_warnings(dataset, provenance),
        *(f"changed during training: {change}" for change in context.changed_settings),
    ]
    if context.validation is None:
        warnings.append(
            "no temperature and no thresholds: the validation split that they are chosen on is not where the run's settings "
            "have it (data.path), or the runs of an ensemble were trained on other data"
        )
    elif shared and context.validation.dataset.fingerprint != dataset.fingerprint:
        warnings.append(
            f"no temperature and no thresholds: {shared} {dataset.groups_name} are also in the validation split that they are chosen on"
        )
    if config.eval.prior_correction and context.prior is None:
        warnings.append(
            "no prior correction: classes were balanced in the training of some runs of the ensemble and not of others"
        )
    return Results(
        split=config.eval.split,
        views=config.eval.views,
        image_size=config.eval.image_size or config.data.image_size,
        dataset=dataset.fingerprint,
        group_name=description.group_name,
        citation=description.citation,
        license=description.license,
        protocol=description.protocol,
        warnings=warnings,
        model=provenance.model,
        trained_on=provenance.dataset,
        best_epoch=context.weights.progress.best_epoch,
        **compute_results(predictions, on_validation, samples, context.prior, provenance.classes, config.eval),
    )
