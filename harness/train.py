"""The story of a run, top to bottom.

In: a `Config` and a `World`. Out: a run folder. What stays true: the weights after step k depend on the settings, the
dataset and k, not on how often the run was interrupted; rank 0 decides when to stop and what is best.
"""

import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from harness import checkpoint
from harness.augment import parse_views, training_view
from harness.config import Config, differences, flat, load_config, to_yaml
from harness.evaluate import evaluate, summary, validate
from harness.hardware import decode_threads
from harness.loader import Batch, training_batches
from harness.log import Log
from harness.metrics import HIGHER_IS_BETTER
from harness.model import build_model, load_weights
from harness.optim import build_optimizer, loss_sum, lr_at
from harness.progress import Progress, advance, should_stop, train_on
from harness.signals import StopRequest
from harness.world import World
from shards.index import Dataset, load
from shards.plan import Plan, share
from shards.store import Store


def train(config: Config, world: World) -> str:
    """Collective: train, validate each epoch, stop, evaluate; or continue a run that is there.

    Returns:
        `finished`, or `stopped` when somebody asked for it: then the same call continues.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: settings, data or a run folder that do not fit; each says what to do.
    """
    parse_views(config.eval.views)
    folder, seed, size = Path(config.run.folder), config.run.seed, config.data.image_size
    dataset = load(config.data.path)
    training, validation = Store(dataset, "train"), Store(dataset, "val")
    final = Store(dataset, config.eval.split)
    plan = Plan(training.shard_sizes, config.data.batch_size, seed, config.data.lanes, config.data.block_shards)
    share(plan.global_batch, world.rank, world.size)
    world.on_main(_open_run, folder, config, dataset)
    if world.decide(world.on_main(_is_finished, folder)):
        world.print(f"{folder} is finished. Its results again; to train anew, name another --run.folder.\n")
        world.print(summary(json.loads((folder / "metrics.json").read_text())))
        return "finished"

    torch.manual_seed(seed)
    model = build_model(config.model.name, len(dataset.classes))
    start = world.decide(world.on_main(_find_start, folder, dataset))
    if start is None:
        world.print(world.on_main(load_weights, model, config.model.name, config.model.weights))
    model.to(world.device, memory_format=torch.channels_last)
    wrapped, optimizer = world.prepare(model, build_optimizer(model, config.optim))
    progress = Progress()
    if start is not None:
        checkpoint.restore(start, model, optimizer, world.scaler)
        progress = start.progress
        world.print(f"continuing {folder} at epoch {progress.epoch + 1}, step {progress.step}")
    about = {"model": config.model.name, "classes": list(dataset.classes), "dataset": dataset.fingerprint}
    world.print(
        f"{sum(plan.shard_sizes)} training images in {plan.n_batches} batches of {plan.global_batch} an epoch "
        f"({plan.n_left_out} left for other epochs), {sum(validation.shard_sizes)} validation, dataset {dataset.fingerprint[:12]}"
    )

    def save() -> None:
        log.flush()
        checkpoint.save_step(folder, progress, about, model, optimizer, world.scaler, config.run.keep)
        _write_state(folder, "running", progress)

    with StopRequest(folder) as stop, Log(folder, progress.step, world.is_main) as log:
        world.on_main(_write_state, folder, "running", progress)
        while (over := should_stop(progress, config.run.epochs, config.run.patience)) is None:
            began, saved, trained, waited = time.perf_counter(), time.perf_counter(), 0, 0.0
            sums = torch.zeros(3, dtype=torch.float64, device=world.device)
            steps, first = 0, progress.samples_seen // plan.global_batch
            batches = training_batches(
                *(training, plan, progress.epoch, first, world.rank, world.size, world.device),
                *(decode_threads(config.data.threads), config.data.batches_ahead),
            )
            log.begin_bar(f"epoch {progress.epoch + 1}", plan.n_batches * plan.global_batch, progress.samples_seen)
            model.train()
            for number, batch in enumerate(batches, start=first):
                lr = lr_at(progress.step + steps, config.optim, plan.n_batches, config.run.epochs)
                torch.manual_seed(seed + progress.step + steps)  # dropout is a function of the step
                views = training_view(batch.images, batch.positions, progress.epoch, seed, config.augment, size)
                sums += _step(wrapped, optimizer, world, config, views, batch, lr)
                steps, waited = steps + 1, waited + batch.waited
                if steps < config.run.log_every and number + 1 < plan.n_batches:
                    continue
                # The ranks meet here: sums of the interval, and what each of them was asked for. (Device sync.)
                due = time.perf_counter() - saved > 60 * config.run.save_every_minutes
                flags = torch.tensor([stop.requested, world.is_main and due], dtype=torch.float64, device=world.device)
                loss, correct, images, stop_asked, save_asked = world.sum(torch.cat([sums, flags])).tolist()
                if not loss < float("inf"):  # also when it is no number
                    raise FloatingPointError(f"The loss is {loss} at step {progress.step + steps}. Lower optim.lr.")
                progress = train_on(progress, steps, steps * plan.global_batch, loss, correct, images)
                trained, steps = trained + images, 0
                sums.zero_()
                seconds = time.perf_counter() - began
                numbers = {
                    "loss": loss / images,
                    "accuracy": correct / images,
                    "lr": lr,
                    "images_per_s": trained / seconds,
                }
                log.write("train", progress.step, numbers)
                log.move_bar(int(images), loss=f"{loss / images:.3f}", accuracy=f"{correct / images:.3f}")
                if (stop_asked or save_asked) and number + 1 < plan.n_batches:
                    world.broadcast_buffers(model)
                    world.on_main(save)
                    saved = time.perf_counter()
                if stop_asked:
                    break
            batches.close()
            log.end_bar()
            if progress.samples_seen < plan.n_batches * plan.global_batch:  # somebody asked to stop inside the epoch
                return _stopped(world, folder, progress)

            seconds = time.perf_counter() - began
            scores = validate(model, validation, config, world)
            done, train_loss, train_accuracy = (
                progress,
                progress.loss / progress.images,
                progress.correct / progress.images,
            )
            higher = HIGHER_IS_BETTER[config.run.monitor]
            progress = world.decide(advance(progress, scores[config.run.monitor], higher))
            is_best = progress.best_step == done.step
            numbers = {name: scores[name] for name in ("loss", "accuracy", "balanced_accuracy", "macro_f1")}
            log.write("val", progress.step, {"epoch": progress.epoch} | numbers)
            speed = {"images_per_s": trained / seconds, "waited": waited / seconds}
            log.write("epoch", progress.step, {"loss": train_loss, "accuracy": train_accuracy, "lr": lr} | speed)
            world.print(
                f"epoch {progress.epoch:>3}/{config.run.epochs}  train loss {train_loss:.3f} acc {train_accuracy:.3f}  "
                f"val loss {scores['loss']:.3f} acc {scores['accuracy']:.3f} bal {scores['balanced_accuracy']:.3f} "
                f"f1 {scores['macro_f1']:.3f}  lr {lr:.1e}  {trained / seconds:.0f} img/s  wait {waited / seconds:.0%}"
                + ("  best" if is_best else "")
            )
            if is_best:
                world.on_main(checkpoint.save_best, folder, progress, about, model)
            world.on_main(save)
            if stop_asked:
                return _stopped(world, folder, progress)

        world.print(
            f"training ends: {over}; best epoch {progress.best_epoch} ({config.run.monitor} {progress.best:.4f})"
        )
        world.barrier()  # the best weights are on disk
        checkpoint.load_model(checkpoint.best(folder, progress), model)
        about |= {"best_epoch": progress.best_epoch, "epochs": progress.epoch, "monitor": config.run.monitor}
        metrics = evaluate(model, final, config.eval.split, config, world, folder, about)
        for name in ("loss", "accuracy", "balanced_accuracy", "macro_f1"):
            log.write(config.eval.split, progress.step, {name: metrics["tta"][name]})
        world.on_main(_write_state, folder, "finished", progress)
        world.print("\n" + summary(metrics))
        world.print(f"run folder: {folder}")
    return "finished"


def _step(wrapped: nn.Module, optimizer, world: World, config: Config, views, batch: Batch, lr: float) -> torch.Tensor:
    """One optimizer step; returns this rank's (sum of losses, correct predictions, images), float64, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    parts = -(-len(views) // (config.optim.micro_batch or len(views)))
    pieces = list(zip(views.tensor_split(parts), batch.labels.tensor_split(parts), strict=True))
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for number, (pictures, labels) in enumerate(pieces, start=1):
        with nullcontext() if number == len(pieces) else world.without_sync(wrapped):
            logits = wrapped(pictures)
            loss = loss_sum(logits, labels, config.optim)
            # Gradients are averaged over ranks: times the world's size, over the global batch, makes that the true mean.
            world.backward(loss * world.size / config.data.batch_size)
        sums += torch.stack([loss.detach(), (logits.argmax(1) == labels).sum(), loss.new_tensor(len(labels))])
    optimizer.step()
    optimizer.zero_grad()
    return sums


def _open_run(folder: Path, config: Config, dataset: Dataset) -> None:
    """Make the run's folder, or check that it belongs to these settings."""
    saved = folder / "config.yaml"
    if saved.is_file():
        changed = differences(flat(load_config(saved)), flat(config))
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}). "
                "Give these settings again to continue it, or name another --run.folder."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no run (no config.yaml). Name another --run.folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stop").unlink(missing_ok=True)
    checkpoint.write_atomically(folder / "dataset.json", dataset.description.to_bytes())
    checkpoint.write_atomically(saved, to_yaml(config).encode())


def _find_start(folder: Path, dataset: Dataset) -> checkpoint.Checkpoint | None:
    """Where to continue, None for a fresh start."""
    found = checkpoint.newest(folder)
    if found is not None and found.about["dataset"] != dataset.fingerprint:
        raise ValueError(
            f"{found.folder} was trained on the dataset {found.about['dataset'][:12]}, and {dataset.folder} is "
            f"{dataset.fingerprint[:12]}. Give the dataset of before, or name another --run.folder."
        )
    return found


def _stopped(world: World, folder: Path, progress: Progress) -> str:
    world.on_main(_write_state, folder, "stopped", progress)
    world.print(f"stopped as asked at step {progress.step}; the same command continues")
    world.barrier()  # no rank leaves before the checkpoint is written: the launcher would kill the others
    return "stopped"


def _write_state(folder: Path, status: str, progress: Progress) -> None:
    state = {"status": status, "epoch": progress.epoch, "step": progress.step, "samples_seen": progress.samples_seen}
    checkpoint.write_atomically(folder / "state.json", (json.dumps(state) + "\n").encode())


def _is_finished(folder: Path) -> bool:
    state = folder / "state.json"
    return (
        state.is_file()
        and json.loads(state.read_text())["status"] == "finished"
        and (folder / "metrics.json").is_file()
    )
