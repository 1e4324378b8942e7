"""Settings in files and on the command line: read, save, compare.

In: arguments as `--config configs/ham10000.yaml --data.path data/ham10000`. Out: a `Config`. Invariants: an unknown key or a
value of the wrong type is an error before anything starts, and one line that names what is near it; files do not inherit
from each other; the command line wins over the file, wherever it stands.
"""

import difflib
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from harness.config.renamed import RENAMED, RENAMED_FILES
from harness.config.sections import Augment, Config, Data, Eval, Model, Optim, Run
from harness.config.yaml_file import nested_keys, read_yaml
from shards.storage import without_secrets

set_parsing_settings(docstring_parse_attribute_docstrings=True)
DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"

SECTIONS = {"data": Data, "augment": Augment, "model": Model, "optim": Optim, "run": Run, "eval": Eval}

# Settings that may differ when a run is continued: they do not change what is computed.
RUNTIME_KEYS = {
    "data.path",
    "data.demo_images",
    "data.threads",
    "data.prefetch_batches",
    "data.decoded_cache",
    "data.cache_dir",
    "data.cache_gb",
    "data.patience_s",
    "run.folder",
    "run.sync_every",
    "run.save_every_minutes",
    "run.keep_checkpoints",
    "run.checkpoint_dir",
    "run.time_limit_minutes",
    "run.on_changed_settings",
    "run.trackers",
    "run.profile",
}

PATHS = (
    "data.path",
    "data.cache_dir",
    "model.weights",
    "run.folder",
    "run.checkpoint_dir",
)  # where a ~ at the front is the user's home


def read_config(
    arguments: list[str],
    default: Path = DEFAULT_CONFIG,
    program: str = "launch/train.py",
    about: str = "Train, evaluate, and continue what was interrupted.",
) -> Config:
    """Read settings: the file named by `--config` (else `default`), then the single settings, in that order.

    Args:
        program, about: which script asks, and what it does; the head of `--help`.

    Raises:
        SystemExit: with code 2 and one line, for a key, a type or a value that cannot be.
    """
    try:
        files, rest = _config_first(arguments)
        files = [str(Path(file).expanduser()) for file in files] or [str(default)]
        for file in files:
            _refuse_unknown(_keys_of_file(Path(file)), f" in {file}")
        _refuse_unknown(_keys_of_words(rest), "")
        parser = _parser(program, about)
        settings = parser.parse_args([*(f"--config={file}" for file in files), *rest])
        read = parser.instantiate(settings)
        return Config(**{name: _checked(name, getattr(read, name)) for name in SECTIONS})
    except (ArgumentError, ValueError, OSError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        raise SystemExit(2) from error


def flat(config: Config) -> dict:
    """Settings by dotted name, as {'data.path': 'data/demo', ...}."""
    return {f"{part}.{key}": value for part, values in _plain(config).items() for key, value in values.items()}


def differences(old: dict, new: dict) -> list[str]:
    """Settings that change what is computed and differ, as `key: OLD is now NEW`; both as from `flat`."""
    keys = sorted((set(old) | set(new)) - RUNTIME_KEYS)
    pairs = ((key, _listed(old.get(key, "absent")), _listed(new.get(key, "absent"))) for key in keys)
    return [f"{key}: {before} is now {now}" for key, before, now in pairs if before != now]


def _plain(config: Config) -> dict[str, dict]:
    """Sections of values. What gives access to a URL is cut out: it is not written anywhere."""
    sections = asdict(config)
    sections["data"]["path"] = without_secrets(config.data.path)
    return sections


def to_yaml(config: Config) -> str:
    """The settings as a file that `--config` reads."""
    plain = {part: {key: _listed(v) for key, v in values.items()} for part, values in _plain(config).items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def load_config(path: Path) -> Config:
    """Read a file that `to_yaml` wrote.

    Raises:
        ValueError: a file of another version of the harness, or a damaged one.
    """
    try:
        saved = read_yaml(Path(path))
        if not (old := [key for key in nested_keys(saved) if key in RENAMED]):
            typed = {name: _typed(kind, saved[name]) for name, kind in SECTIONS.items()}
            return Config(**{name: kind(**typed[name]) for name, kind in SECTIONS.items()})
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or of another version of the harness ({error}). Restore a copy, start a new run folder, or "
            "continue with the settings that you give now by --run.on_changed_settings accept."
        ) from error
    raise ValueError(
        f"{path} is of version 0.1 of the harness ({old[0]} is now {RENAMED[old[0]]}), whose runs are not continued. "
        f"Name another --run.folder; to train on from its weights, give --model.weights with the "
        f"checkpoints/best-N/model.safetensors of {Path(path).parent}."
    )


def _sentence(error: Exception) -> str:
    """One line of an error, the parser's own in the words of ours."""
    text = " ".join(str(error).split())
    found = re.match(r'Parser key "([\w.]+)": Expected a (.+?)\. Got value: (.*)', text)
    if not found:
        return text
    key, kind, value = found.groups()
    kind = re.sub(r"<class '(\w+)'>", r"\1", kind)
    kind = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind).replace("'", "")
    hint = " In a file, put it in quotes: YAML takes on and off for true and false." if "on, off" in kind else ""
    return f"The '{key}' setting must be {kind}. Got {value} instead.{hint if value in ('True', 'False') else ''}"


def _checked(name: str, section):
    """A section whose values all are of their types (the parser lets null pass), and whose paths have no ~ any more.

    Raises:
        ValueError: naming the first value that is not.
    """
    for key, kind in get_type_hints(type(section)).items():
        value = getattr(section, key)
        if value is None and not _is_a(value, kind):
            hint = " Write none for training from scratch." if key == "weights" else ""
            raise ValueError(
                f"The '{name}.{key}' setting has no value (null).{hint or ' Name one, or leave the line out.'}"
            )
        if f"{name}.{key}" in PATHS and isinstance(value, str) and value.startswith("~"):
            section = replace(section, **{key: str(Path(value).expanduser())})
    return section


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def _typed(section: type, values: dict) -> dict:
    """The settings of a section as it wants them: lists as tuples.

    Raises:
        TypeError: a value of another type than the setting's.
    """
    kinds, typed = get_type_hints(section), {}
    for key, value in values.items():
        typed[key] = tuple(value) if isinstance(value, list) else value
        if key in kinds and not _is_a(typed[key], kinds[key]):
            raise TypeError(f"{key} cannot be {str(value)[:40]}")
    return typed


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value of YAML has a setting's type: bool, int, float, str, a Literal, a union or a tuple of one of these."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if not isinstance(value, tuple) or (Ellipsis not in kinds and len(value) != len(kinds)):
            return False
        return all(_is_a(entry, kinds[0]) for entry in value)
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _parser(program: str, about: str) -> ArgumentParser:
    parser = ArgumentParser(prog=program, description=about, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; settings after it on the command line win")
    for name, kind in SECTIONS.items():
        parser.add_class_arguments(kind, name)
    return parser


def _config_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split off --config: the parser applies arguments in order, and the command line must win over the file."""
    files, rest, remaining = [], [], list(arguments)
    while remaining:
        word = remaining.pop(0)
        if word == "--config" and remaining:
            files.append(remaining.pop(0))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    return files, rest


def _keys_of_file(path: Path) -> list[str]:
    """Dotted keys of a YAML file."""
    if not path.is_file():
        if path.name in RENAMED_FILES:
            raise FileNotFoundError(f"{path} is now {path.with_name(RENAMED_FILES[path.name])}. Give that as --config.")
        raise FileNotFoundError(f"The settings file {path} is not there. Give another as --config.")
    try:
        return nested_keys(read_yaml(path))
    except ValueError as error:
        raise ValueError(f"The settings file {path} cannot be read: {error}. Correct it.") from error


def _keys_of_words(words: list[str]) -> list[str]:
    """Dotted keys that the command line names."""
    names = (word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--"))
    return [name for name in names if name not in ("help", "print_config")]


def _refuse_unknown(keys: list[str], where: str) -> None:
    """Refuse keys that are not settings, with the name of today or the nearest ones.

    Raises:
        ValueError: naming the first of them.
    """
    known = list(flat(Config()))
    for key in keys:
        if key in RENAMED:
            raise ValueError(f"The '{key}' setting{where} is now {RENAMED[key]}.")
        if key not in known:
            near = (
                difflib.get_close_matches(key, known, 3, 0.75) or [n for n in known if n.partition(".")[0] == key][:3]
            )
            last = key.rpartition(".")[2]
            near = near or difflib.get_close_matches(last, [n.partition(".")[2] for n in known], 3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " `--help` lists all settings."
            raise ValueError(f"Unknown setting '{key}'{where}.{hint}")
