"""A YAML file of settings, which somebody else may have written.

In: a path. Out: sections of plain values. Invariants: no tag makes an object, and nothing deeper than a list of values comes through.
"""

from pathlib import Path

import yaml


def read_yaml(path: Path) -> dict[str, dict]:
    """A file of settings: sections of plain values and of lists of such. YAML's tags make no objects here.

    Raises:
        ValueError: it is anything else.
    """
    problem = None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            problem = "it has no sections (data, augment, model, optim, run, eval)"
        for section in content.values() if not problem else ():
            for value in section.values() if isinstance(section, dict) else ():
                # Before anything is printed: a few lines that name each other can stand for gigabytes.
                if isinstance(value, dict | set) or (isinstance(value, list) and any(map(_is_nested, value))):
                    problem = "a setting is a value or a list of values, and here is a deeper one"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = f"it is not YAML in UTF-8 ({error})"
    except (RecursionError, ValueError, TypeError, OverflowError) as error:  # YAML's dates and numbers that are none
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ValueError(problem)
    return content


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list | set)


def nested_keys(content: dict) -> list[str]:
    """Dotted keys of sections of settings."""
    nested = ((part, values if isinstance(values, dict) else {"": 0}) for part, values in content.items())
    return [f"{part}.{key}".rstrip(".") for part, values in nested for key in values]
