"""Weights of another implementation of a network, under the names of ours: `python -m harness.model.convert FILE --like NAME OUT`.

In: a file of tensors by name. Out: a .safetensors file that 'model.weights' takes, which says its model, mean and deviation.
Invariants: each tensor but the head's has a partner of the same shape and the same last name (weight, bias, running_mean, ...), or
nothing is written; no pickle is executed.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save

from harness.model.build import find_head, outline
from harness.model.normalization import normalization_of
from harness.model.weights import read_state_dict, surplus_layers
from shards.files import sha256, write_atomically
from shards.terminal import run_and_exit, user_path

COUNTER = "num_batches_tracked"  # of batch normalisation, which old files lack
Tensors = dict[str, torch.Tensor]


def match_tensors(found: Tensors, wanted: Tensors, head: str, ordered: bool = True) -> dict[str, str]:
    """Which tensor of a file is which of a model: by their names, if all are there, else by their order.

    Args:
        found: of the file. wanted: of the model. Both in the order of their modules. head: the model's last layer, whose tensors may
            have another number of classes, or be missing. ordered: whether the order of `found` is the
            modules'; a .safetensors file has it sorted.

    Returns:
        {name in the model: name in the file}.

    Raises:
        ValueError: naming the first tensor that has no partner.
    """
    of_head = [name for name in wanted if name.startswith(f"{head}.")]
    lacking = [name for name in wanted if name not in (*found, *of_head) and not name.endswith(COUNTER)]
    if not lacking:
        if surplus := surplus_layers(found, wanted, head):
            raise ValueError(f"it is of a larger network, with {len(surplus)} more layers, {surplus[0]} the first")
        theirs = ours = [name for name in wanted if name in found]
    elif ordered:
        theirs, ours = _in_order(list(found), list(wanted), of_head)
    else:
        raise ValueError(f"it has no {lacking[0]}, and its order tells nothing, as .safetensors files are sorted")
    for name, other in zip(ours, theirs, strict=False):
        skipped = 1 if name in of_head else 0  # the number of classes
        shapes = tuple(found[other].shape), tuple(wanted[name].shape)
        if len(shapes[0]) != len(shapes[1]) or shapes[0][skipped:] != shapes[1][skipped:]:
            raise ValueError(f"{other} is {shapes[0]}, and {name} of the model is {shapes[1]}")
        if name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise ValueError(f"{other} stands where the model has {name}")
        if name != other and (name in theirs or other in ours):
            raise ValueError(
                f"{other} stands where the model has {name}, and one of the two names is elsewhere in the other"
            )
    if len(theirs) != len(ours):
        place = min(len(theirs), len(ours))
        odd = [*theirs[place:], *ours[place:]][0]
        raise ValueError(
            f"it has {len(theirs)} tensors, and the model {len(ours)}; the first without a partner is {odd}"
        )
    return dict(zip(ours, theirs, strict=True))


def _in_order(found: list[str], wanted: list[str], of_head: list[str]) -> tuple[list[str], list[str]]:
    """The names of a file and of a model that are partners by their places, without what only one of the two may have."""
    if sum(name.endswith(COUNTER) for name in found) != sum(name.endswith(COUNTER) for name in wanted):
        found, wanted = ([name for name in names if not name.endswith(COUNTER)] for names in (found, wanted))
    if len(found) == len(wanted) - len(of_head):
        wanted = [name for name in wanted if name not in of_head]
    return found, wanted


def read_foreign(path: Path) -> Tensors:
    """The tensors of a file, also where they are in the `state_dict` or `model` of a checkpoint, or saved through DDP.

    Raises:
        ValueError: it is no such file. OSError: it cannot be read.
    """
    found = read_state_dict(path, ("state_dict", "model"))
    prefix = "module." if all(name.startswith("module.") for name in found) else ""  # of DDP
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def convert(path: Path, name: str, out: Path) -> list[str]:
    """Write the weights of a file under the names of a model.

    Args:
        name: of the model, as in 'model.name'. out: .safetensors.

    Returns:
        lines that say which tensor became which.

    Raises:
        ValueError: they do not fit, or a name that is none. OSError: a file that cannot be read or written.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"OUT must end in .safetensors. Got {out}.")
    if out.exists():
        raise FileExistsError(f"{out} exists. Name another file.")
    model, found = outline(name, 1000), read_foreign(path)
    try:
        pairs = match_tensors(found, model.state_dict(), find_head(model), path.suffix != ".safetensors")
    except ValueError as error:
        raise ValueError(f"{path} does not fit {name}: {error}. Name the model that it is of as --like.") from error
    mean, std = normalization_of(name)
    words = {"format": "pt", "model": name, "mean": json.dumps(mean), "std": json.dumps(std)}
    words |= {"source": path.name, "source_sha256": sha256(path)}
    write_atomically(out, save({name: found[other].contiguous() for name, other in pairs.items()}, metadata=words))
    lines = [f"{other} -> {name} {tuple(found[other].shape)}" for name, other in pairs.items()]
    lines += [f"(none) -> {name}" for name in model.state_dict() if name not in pairs]
    lines += [f"{other} -> (left out)" for other in found if other not in pairs.values()]
    how = "by name" if all(name == other for name, other in pairs.items()) else "by order and shape"
    return [*lines, f"{len(pairs)} of {len(found)} tensors {how}; mean {words['mean']}, std {words['std']}: {out}"]


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, or 1 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.model.convert",
        description="Write weights of another implementation of a network under the names of a model of torchvision or timm.",
    )
    parser.add_argument("file", type=user_path, help="tensors by name: .pth or .safetensors")
    parser.add_argument("--like", required=True, metavar="NAME", help="the same network, as in model.name")
    parser.add_argument("out", type=user_path, help=".safetensors file to write")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(convert(options.file, options.like, options.out)))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
