"""Every check before a run, once: training raises the first that fails, the doctor prints them all.

In: settings and a `World`, or only the name of a GPU. Out: `Check`s, each with what fixes it, and the opened `Data`. Invariants: a
check looks and changes nothing; what differs between ranks is told by the rank that differs; what training refuses of machine, data,
settings and weights before its first step, `preflight` finds; a start alone finds what a run folder holds (its lock, its checkpoints).
"""

import math
from pathlib import Path

import torch

from harness.config import Config
from harness.data.augment import parse_views
from harness.distributed.hardware import check_compile
from harness.distributed.trackers import check_trackers
from harness.distributed.world import World
from harness.evaluation.results import classes_of
from harness.model.build import check_input_size, outline
from harness.model.layers import head_weights, number_layers
from harness.model.weights import check_file, locate_weights
from harness.run.folder import check_folder
from harness.training.check import Check, tried
from harness.training.machine import check_consistency, check_device
from harness.training.state import Data, open_data
from harness.training.storage import check_cache, check_disk, check_shared
from shards.catalogue import preview
from shards.index import load_table
from shards.leaks import refuse_leak
from shards.plan import largest_share, rank_slice
from shards.storage import is_url, without_secrets

FEW_IMAGES, FEW_STEPS = 16, 10  # below which batch statistics are noise, and a schedule is coarse


def preflight(config: Config, world: World) -> tuple[list[Check], Data | None]:
    """Collective: every check that a run must pass, and the data that it will read, None where they cannot be opened."""
    with world.long_work():  # a download, which has a limit of its own
        data, opened = _open(config)
    here = [*check_device(), *opened]
    failed = [check for found in world.all_gather_objects(here) for check in found if check.level == "fail"]
    checks = [*here, *failed]
    checks += check_consistency(world, data.dataset.fingerprint[:12] if data else "none")
    checks += check_shared(config.run.folder, world)
    checks += world.run_on_main(_check_on_main, config, world.size, world.device, data)
    return list(dict.fromkeys(checks)), data


def _open(config: Config) -> tuple[Data | None, list[Check]]:
    """The data, or why there are none."""
    if config.data.demo_images and is_url(config.data.path):
        text = f"'data.demo_images' ({config.data.demo_images}) draws into a folder, and {without_secrets(config.data.path)} is a URL"
        return None, [Check("fail", "data", text, "set --data.demo_images 0")]
    if config.data.demo_images and not (Path(config.data.path) / "dataset.json").is_file():
        return None, [Check("ok", "data", f"{config.data.path} is not there yet: the demo draws it")]
    try:
        data = open_data(config)
    except (OSError, ValueError) as error:
        return None, [Check("fail", "data", str(error))]
    text = f"{data.dataset.folder}: {len(data.dataset.shards)} shards, dataset {data.dataset.fingerprint[:12]}"
    return data, [Check("ok", "data", text), *check_cache(data)]


def _check_on_main(config: Config, n_ranks: int, device: torch.device, data: Data | None) -> list[Check]:
    """The checks that one rank can make for all."""
    checks = tried("settings", check_settings, config, device)
    if data is not None:
        checks += tried("data", check_classes, config, data)
        checks += tried("leak", check_leaks, config, data)
        checks += tried("evaluation", check_evaluation, config, data)
        checks += tried("processes", check_ranks, config, data, n_ranks)
        checks += tried("run folder", check_run_folder, config, data)
    try:
        model = outline(config.model.name, len(data.dataset.classes) if data else 2, config.model.drop_path)
    except ValueError as error:
        return [*checks, Check("fail", "model", str(error))]
    checks += tried("weights", check_weights, config, model, data.dataset.classes if data else None)
    checks += tried("model", check_input_sizes, config, model)
    checks += tried("model", check_parts, config, model)
    checks += tried("disk", check_disk, config, model)
    if data is not None:
        checks += check_recipe(config, model, data.plan.n_batches, n_ranks, data.dataset.description.size)
    return checks


def check_settings(config: Config, device: torch.device) -> list[Check]:
    """Settings that this device, or what is installed, does not allow."""
    if config.model.sync_batchnorm and device.type != "cuda":
        raise ValueError("'model.sync_batchnorm' needs GPUs: torch has it for no other device. Set it to false.")
    if config.model.sync_batchnorm and config.optim.micro_batch == "auto":
        raise ValueError(
            "'optim.micro_batch' auto tries a step on each process alone, which 'model.sync_batchnorm' does not allow. Give a number."
        )
    if config.run.compile and config.optim.freeze_epochs:
        raise ValueError(
            "'optim.freeze_epochs' trains the first epochs without the compiled step of 'run.compile'. Set one of them off."
        )
    if config.run.compile:
        check_compile(device)
        if config.run.compile_mode != "default" and config.optim.micro_batch != 0:
            raise ValueError(
                f"'run.compile_mode' {config.run.compile_mode} replays each pass in the same memory, where the gradients of the micro-batch "
                "before still are. Set 'optim.micro_batch' to 0, or 'run.compile_mode' to default."
            )
    parse_views(config.eval.views)
    check_trackers(config.run.trackers)
    return [Check("ok", "settings", f"{config.model.name}, {config.data.image_size} px, views {config.eval.views}")]


def check_input_sizes(config: Config, model: torch.nn.Module) -> list[Check]:
    """Whether the model takes images of these sizes."""
    check_input_size(model, config.model.name, config.data.image_size)
    if config.eval.image_size:
        check_input_size(model, config.model.name, config.eval.image_size, "eval.image_size")
    return []


def check_parts(config: Config, model: torch.nn.Module) -> list[Check]:
    """Whether the model has the parts that are trained in another way than the rest."""
    if config.optim.layer_decay < 1:
        number_layers(model)
    if not config.optim.freeze_epochs:
        return []
    head_weights(model)
    if config.model.weights != "none":
        return []
    text = f"the head alone is trained for {config.optim.freeze_epochs} epoch(s), on a network without trained weights"
    return [Check("warn", "recipe", text, "set --optim.freeze_epochs 0, or give --model.weights")]


def check_classes(config: Config, data: Data) -> list[Check]:
    """Mixing and balancing need several classes in the training split."""
    counts = data.dataset.description.counts["train"]
    if sum(1 for images in counts.values() if images) > 1:
        return []
    asked = {
        "augment.mixup_prob": (config.augment.mixup_prob, 0.0),
        "augment.cutmix_prob": (config.augment.cutmix_prob, 0.0),
        "optim.balance": (config.optim.balance, "none"),
    }
    for key, (value, off) in asked.items():
        if value != off:
            raise ValueError(
                f"'{key}' ({value}) needs several classes, and the training split of 'data.path' ({data.dataset.folder}) has one. "
                f"Set {key} to {off}."
            )
    return []


def check_evaluation(config: Config, data: Data) -> list[Check]:
    """Classes and columns that the settings name and the data lack: nothing will be said of them."""
    named, found = config.eval, []
    if unknown := [name for name in named.positive_classes if not classes_of(name, data.dataset.classes)]:
        text = f"no threshold for {', '.join(unknown)} (eval.positive_classes): the classes are {preview(data.dataset.classes)}"
        found.append(Check("warn", "evaluation", text, "name classes of this dataset, joined by +, or none: []"))
    columns = load_table(data.dataset, data.test.shards[0]).columns
    if unknown := [name for name in named.subgroups if name not in columns]:
        text = f"no subgroups by {', '.join(unknown)} (eval.subgroups), which the packed data have no column of"
        found.append(Check("warn", "evaluation", text, "name columns of the source, or none: []"))
    return found


def check_leaks(config: Config, data: Data) -> list[Check]:
    """No training group in an evaluation split, unless the settings allow it."""
    if config.data.allow_leak:
        return []
    refuse_leak(data.dataset)
    return [Check("ok", "leak", "no training group is in an evaluation split")]


def check_ranks(config: Config, data: Data, n_ranks: int) -> list[Check]:
    """Each process gets images of each batch, and of each micro-batch."""
    batch, group, micro_batch = data.plan.global_batch, config.augment.group_size, config.optim.micro_batch
    start, stop = rank_slice(batch, 0, n_ranks, group)  # rank 0 has the smallest share
    largest = largest_share(batch, n_ranks, group)
    if micro_batch not in (0, "auto") and stop - start < -(-largest // micro_batch):
        raise ValueError(
            f"'optim.micro_batch' {micro_batch} cuts shares of {largest} and of {stop - start} images into as many parts. Raise it, "
            f"or let the number of processes ({n_ranks}) divide 'data.global_batch_size' ({batch})."
        )
    return []


def check_run_folder(config: Config, data: Data) -> list[Check]:
    """The run folder is free, or holds this run."""
    check_folder(Path(config.run.folder), config, data.dataset)
    return []


def check_recipe(
    config: Config, model: torch.nn.Module, n_batches: int, n_ranks: int, stored: list[int]
) -> list[Check]:
    """What the number of processes and the images, stored at (width, height), make of the settings."""
    found, images = [], config.data.global_batch_size // n_ranks
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    piece = min(images, images if config.optim.micro_batch in (0, "auto") else config.optim.micro_batch)
    together = piece * n_ranks if config.model.sync_batchnorm else piece
    if norms and together < FEW_IMAGES:
        text = f"batch normalisation sees {together} images at a time ({config.data.global_batch_size} over {n_ranks} process(es))"
        fix = "raise --data.global_batch_size (and the learning rate with it)"
        if n_ranks > 1 and not config.model.sync_batchnorm:
            fix += ", or set --model.sync_batchnorm true on GPUs"
        found.append(Check("warn", "recipe", text, fix))
    if n_batches < FEW_STEPS:
        text = f"an epoch has {n_batches} steps, each of {config.data.global_batch_size} images"
        found.append(Check("warn", "recipe", text, "lower --data.global_batch_size, or train for more epochs"))
    if (size := max(config.data.image_size, config.eval.image_size)) > min(stored):
        text = f"images are stored at {stored[0]}x{stored[1]} and enlarged to {size} pixels"
        fix = f"pack them larger: python -m shards pack SOURCE OUT --size {math.ceil(size * 4 / 3)}x{size}"
        found.append(Check("warn", "recipe", text, fix))
    return found


def check_weights(config: Config, model: torch.nn.Module, classes: tuple[str, ...] | None) -> list[Check]:
    """The weights that training starts from are there, or can be downloaded, and fit the model of these classes."""
    if any((Path(config.run.folder) / "checkpoints").glob("step-*")):
        return [Check("ok", "weights", f"those of the latest checkpoint in {config.run.folder}")]
    file = locate_weights(config.model.name, config.model.weights)
    if file is None:
        return [Check("ok", "weights", "none: training from scratch")]
    if file.path.is_file():
        said = check_file(file.path, model, config.model.name, classes, config.model.head)
        return [Check("ok", "weights", said.removeprefix("weights: "))]
    fix = f"where there is no network, place the file at {file.path}, or set --model.weights none"
    return [Check("warn", "weights", f"{file.path.name} will be downloaded at the start", fix)]
