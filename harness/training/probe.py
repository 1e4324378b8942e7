"""A linear probe: a trained network as it is, and a logistic regression on its features. What a fine-tuned model must beat.

In: a `Config` and a `World`. Out: a run folder like a training's, whose best weights are the network with the fitted head. Invariants:
nothing but the head is fitted; the strength of its penalty is chosen on validation; the fit depends neither on the number of processes
nor on the order of the images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness.config import Config
from harness.distributed.collectives import copy_from_main
from harness.distributed.world import World
from harness.evaluation.features import split_features
from harness.evaluation.metrics import HIGHER_IS_BETTER, compute_metrics
from harness.model.build import build_model, find_head
from harness.model.weights import load_weights
from harness.run import checkpoint
from harness.run.folder import PROBE_FILE, Run, open_run
from harness.run.progress import Progress, after_epoch
from harness.training.check import refuse_failures
from harness.training.preflight import preflight
from harness.training.state import Data
from harness.training.train import evaluate_best, report_again
from shards.files import write_atomically

STRENGTHS = tuple(float(f"{10**exponent:.2g}") for exponent in np.arange(-5, 1.25, 0.5))  # C of scikit-learn
MAX_ITERATIONS, TOLERANCE = 5000, 1e-5
NEVER = -30.0  # logit of a class without training images


@dataclass(frozen=True)
class Probe:
    """A fitted head for C classes and F features.

    weight: (C, F), bias: (C,), both float32. c: inverse strength of the penalty. tried: (c, validation score) of each.
    """

    weight: np.ndarray
    bias: np.ndarray
    c: float
    score: float
    tried: tuple[tuple[float, float], ...]


def probe(config: Config, world: World) -> str:
    """Collective: compute features, fit a head, save it as a run's best weights, evaluate.

    Returns:
        `finished`, or `stopped` when somebody asked for it.

    Raises:
        ValueError, OSError: as training; also weights that are none, one class alone, or a folder that holds a training.
    """
    if config.model.weights == "none":
        raise ValueError("A probe of random weights says nothing of a network. Give its weights as --model.weights.")
    if config.run.monitor == "last":
        raise ValueError(
            "A probe chooses its penalty on validation: 'run.monitor' must not be last. Set it to balanced_accuracy."
        )
    checks, data = preflight(config, world)
    world.run_on_main(refuse_failures, checks)
    assert data is not None
    with open_run(config, world, data.dataset) as run:
        world.run_on_main(refuse_training, run.folder)
        if run.is_finished():
            return report_again(world, run)
        model = build_model(config.model.name, len(data.dataset.classes))
        classes = data.dataset.classes
        world.print(world.run_on_main(load_weights, model, config.model.name, config.model.weights, classes, "new"))
        world.run_on_main(run.accept_settings)
        model.to(device=world.device, memory_format=world.memory_format)  # pyright: ignore[reportCallIssue] - torch's own stub
        copy_from_main(world, model)
        return fit_and_evaluate(config, world, data, model, run)


def refuse_training(folder: Path) -> None:
    """Refuse a folder in which a training began.

    Raises:
        ValueError: naming it.
    """
    if checkpoint.latest_first(folder, "step-"):
        raise ValueError(f"{folder} holds checkpoints of a training. Name another --run.folder for the probe.")


def fit_and_evaluate(config: Config, world: World, data: Data, model: nn.Module, run: Run) -> str:
    """Collective: what `probe` does with a model that has its weights."""
    head = model.get_submodule(find_head(model))
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ValueError(
            f"{config.model.name} does not end in a linear layer with a bias, which a probe needs. Use another model."
        )
    splits = []
    for reader in (data.train, data.val):
        if (found := split_features(model, reader, config, world, run.stop.asked)) is None:
            return run.stopped(Progress(), "starts the probe again")
        splits.append(found)
    world.print(f"features of {sum(data.train.shard_sizes)} training and {sum(data.val.shard_sizes)} validation images")

    def fit() -> Probe:
        (of_train, labels), (of_val, val_labels) = ((f.numpy(), y.numpy()) for f, y in splits)
        return fit_head(of_train, labels, of_val, val_labels, data.dataset.classes, config)

    fitted = world.run_on_main(fit)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(fitted.weight))
        head.bias.copy_(torch.from_numpy(fitted.bias))
    monitor = config.run.monitor
    progress = after_epoch(Progress(step=1), fitted.score, HIGHER_IS_BETTER[monitor])
    world.print(f"penalty C = {fitted.c:g} of {len(fitted.tried)}, by validation {monitor} {fitted.score:.4f}")
    world.run_on_main(save, run, progress, model, fitted, monitor)
    return evaluate_best(config, world, data, model, run, progress)


def save(run: Run, progress: Progress, model: nn.Module, fitted: Probe, monitor: str) -> None:
    """Write the weights, and the validation score of each strength as `probe.csv`."""
    lines = [f"c,{monitor}", *(f"{c:g},{score:.6f}" for c, score in fitted.tried)]
    write_atomically(run.folder / PROBE_FILE, ("\n".join(lines) + "\n").encode())
    checkpoint.save_best(run.folder, progress, run.provenance, model)


def fit_head(
    features: np.ndarray,
    labels: np.ndarray,
    val_features: np.ndarray,
    val_labels: np.ndarray,
    classes: tuple[str, ...],
    config: Config,
) -> Probe:
    """Multinomial logistic regression with an L2 penalty on standardised features; C is the one of the best validation score.

    `optim.balance` counts as in training: `weights` and `sampler` weigh images by the inverse frequency of their class; `logit-adjust`
    subtracts the logarithm of its share (Menon et al., 2021), so that the head assumes equal classes.

    Args:
        features: (N, F), labels: (N,) numbers of classes. val_features, val_labels: of the validation split.

    Raises:
        ValueError: training images of one class alone.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # scikit-learn brings it

    known = np.unique(labels)
    if len(known) < 2:
        raise ValueError(f"All training images are of one class ({classes[known[0]]}). A probe needs two.")
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    scaled = (features - mean) / deviation
    balanced = config.optim.balance in ("weights", "sampler")
    model = LogisticRegression(
        max_iter=MAX_ITERATIONS, tol=TOLERANCE, class_weight="balanced" if balanced else None, warm_start=True
    )
    heads, tried = [], []
    for c in STRENGTHS:
        with threadpool_limits(1):  # sums over a number of threads that differs between machines would differ
            model.set_params(C=c).fit(scaled, labels)
        head = _head(model, known, len(classes), mean, deviation)
        if config.optim.balance == "logit-adjust":
            shares = np.bincount(labels, minlength=len(classes)) / len(labels)
            head = head[0], np.where(shares > 0, head[1] - np.log(np.maximum(shares, 1e-12)), NEVER)
        probabilities = _softmax(val_features @ head[0].T + head[1])
        score = compute_metrics(probabilities, val_labels, classes)[config.run.monitor]
        heads.append(head)
        tried.append((c, float(score)))
    better = max if HIGHER_IS_BETTER[config.run.monitor] else min
    best = tried.index(better(tried, key=lambda one: one[1]))
    weight, bias = heads[best]
    c, score = tried[best]
    return Probe(weight.astype(np.float32), bias.astype(np.float32), c, score, tuple(tried))


def _head(
    model, known: np.ndarray, n_classes: int, mean: np.ndarray, deviation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (C, F) and bias (C,) for features as they are; a class that is not known is never predicted."""
    coefficients, intercept = model.coef_, model.intercept_
    if len(known) == 2:  # scikit-learn keeps one row, the difference
        coefficients, intercept = (
            np.concatenate([-coefficients, coefficients]) / 2,
            np.concatenate([-intercept, intercept]) / 2,
        )
    weight, bias = np.zeros((n_classes, len(mean))), np.full(n_classes, NEVER)
    weight[known] = coefficients / deviation
    bias[known] = intercept - weight[known] @ mean
    return weight, bias


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)
