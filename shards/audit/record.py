"""What was found by the audit of a dataset, for whoever trains on it.

In: the folder beside a packed dataset. Out: a summary, or sentences. Invariants: an audit of other bytes is none; nothing that an audit
needs is imported.
"""

from pathlib import Path

from shards.files import write_atomically
from shards.index import Dataset
from shards.shape import misfit, parse_json
from shards.storage import without_secrets

NAME = "audit.json"
SHAPE = {
    "images": int,
    "threshold": int,
    "pairs": int,
    "leaks": int,
    "splits": {str: int},
    "fingerprints": {str: str},
}


def default_folder(path: Path | str, other: Path | str | None = None) -> Path:
    """Where an audit is written: beside what was audited, or the first of two; of a URL, here."""
    name = "-and-".join(_name(place) for place in (path, other) if place) + "-audit"
    return Path(name) if isinstance(path, str) else path.resolve().with_name(name)


def _name(place: Path | str) -> str:
    return without_secrets(place).rstrip("/").rpartition("/")[2] if isinstance(place, str) else place.resolve().name


def find_audit(dataset: Dataset) -> dict | None:
    """The summary of the audit of a packed dataset alone; None where none is beside it, or where it was packed again since."""
    if not isinstance(dataset.folder, Path):  # behind a URL
        return None
    summary = read_audit(default_folder(dataset.folder))
    return summary if summary and set(summary["fingerprints"].values()) == {dataset.fingerprint} else None


def keep_audit(dataset: Dataset, folder: Path) -> None:
    """Copy the summary of the audit of a dataset into the folder of a run, for its report.

    Raises:
        OSError: the folder cannot be written.
    """
    if find_audit(dataset) is not None:
        write_atomically(folder / NAME, (default_folder(Path(str(dataset.folder))) / NAME).read_bytes())


def read_audit(folder: Path) -> dict | None:
    """The summary in a folder; None where there is none, or a damaged one."""
    try:
        summary = parse_json((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or misfit({name: summary.get(name) for name in SHAPE}, SHAPE):
        return None
    return summary


def describe(summary: dict) -> str:
    """One sentence."""
    return (
        f"{summary['images']} images compared, {summary['pairs']} pairs under different names show one thing (from "
        f"{summary['threshold']} key points that agree), {summary['leaks']} of them between splits"
    )


def audit_warnings(dataset: Dataset, split: str) -> list[str]:
    """One sentence if an audit found images of a split that show what another split shows, too; else nothing."""
    summary, split = find_audit(dataset) or {"splits": {}}, dataset.description.aliases.get(split, split)
    leaks = sum(n for pair, n in summary["splits"].items() if split in (ends := pair.split(" and ")) and len(ends) == 2)
    if not leaks:
        return []
    return [
        f"an audit found {leaks} pairs of images of one thing in the {split} split and in another: the scores may be too high "
        "(audit.html shows them; pack with --merge-duplicates)"
    ]
