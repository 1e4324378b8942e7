"""What a benchmark wrote with --json, read again.

In: the name of a benchmark and a file. Out: its numbers. Invariants: what is returned has the keys that are used, of the right type and above 0.
"""

from pathlib import Path

from shards.shape import misfit, parse_json

# What the benchmarks write with --json, as far as it is used; no other benchmark writes the first key of each.
SHAPES: dict[str, dict[str, type]] = {
    "step": {
        "step_ms": float,
        "augment_ms": float,
        "batch": int,
        "processes": int,
        "model": str,
        "gradient_bytes": int,
        "setting": str,
    },
    "loader": {"decode_ceiling_images_per_s": float, "images_per_s": float, "threads": int},
    "save": {"save_s": float},
    "remote": {"warm_cache_images_per_s": float, "cached_mb": float, "images": int},
}


def read_json(name: str, path: Path) -> dict:
    """What `python -m launch.bench NAME --json` wrote.

    Raises:
        ValueError: it is of another benchmark, of an older version, or has a number that cannot be; with what to do.
        OSError: it cannot be read.
    """
    advice = f"It must be what `python -m launch.bench {name} --json FILE` writes"
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"--{name} {path} is no JSON ({error}). {advice}.") from error
    if problem := misfit(found, SHAPES[name], "the file"):
        keys = found if isinstance(found, dict) else {}
        others = [other for other, shape in SHAPES.items() if other != name and next(iter(shape)) in keys]
        advice += (
            f"; this looks like that of `{others[0]}`: give it as --{others[0]}" if others else ", of this version"
        )
        raise ValueError(f"--{name} {path}: {problem}. {advice}.")
    if wrong := [key for key, kind in SHAPES[name].items() if kind is not str and found[key] <= 0]:
        raise ValueError(f"--{name} {path}: {wrong[0]} is {found[wrong[0]]}, and must be above 0. {advice}.")
    return found


def source_of(name: str, path: Path, found: dict) -> str:
    """Where a measured number came from, in words."""
    machine = found.get("machine")
    device = f" on {machine['device']}" if isinstance(machine, dict) and "device" in machine else ""
    return f"measured by {name}{device}: {path}"
