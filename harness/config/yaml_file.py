"""A YAML file of settings, which somebody else may have written.

In: a path. Out: sections of plain values. Invariants: no tag makes an object, and nothing deeper than a list of values comes through.
"""

from pathlib import Path

import yaml

MERGE = "tag:yaml.org,2002:merge"  # <<, which may stand beside keys of what it brings


def read_yaml(path: Path) -> dict[str, dict]:
    """A file of settings: sections of plain values and of lists of such. YAML's tags make no objects here.

    Raises:
        ValueError: it is anything else.
    """
    problem = None
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
        if not isinstance(content, dict):
            problem = "it has no sections (data, augment, model, optim, run, eval)"
        for section in content.values() if not problem else ():
            for value in section.values() if isinstance(section, dict) else ():
                # Before anything is printed: a few lines that name each other can stand for gigabytes.
                if isinstance(value, dict | set) or (isinstance(value, list) and any(map(_is_nested, value))):
                    problem = "a setting is a value or a list of values, and here is a deeper one"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = f"it is not YAML in UTF-8 ({error})"
    except KeyError as error:
        problem = error.args[0]
    except (RecursionError, ValueError, TypeError, OverflowError) as error:  # YAML's dates and numbers that are none
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ValueError(problem)
    return content


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping; its keys are those of the file."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in seen:
                    raise KeyError(f"{key.value!r} is there twice, in lines {seen[key.value]} and {line}")
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def _is_nested(value: object) -> bool:
    return isinstance(value, dict | list | set)


def nested_keys(content: dict) -> list[str]:
    """Dotted keys of sections of settings."""
    nested = ((part, values if isinstance(values, dict) else {"": 0}) for part, values in content.items())
    return [f"{part}.{key}".rstrip(".") for part, values in nested for key in values]
