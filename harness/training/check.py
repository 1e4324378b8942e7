"""One finding before a run: how it is, and what fixes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what fixes it (a command, where there is one)."""

    level: Literal["ok", "warn", "fail"]
    name: str
    message: str
    fix: str = ""


def refuse_failures(checks: list[Check]) -> None:
    """Raise if any of the checks failed.

    Raises:
        ValueError: the first of them, and what fixes it.
    """
    for check in checks:
        if check.level == "fail":
            raise ValueError(f"{check.message}. To fix it: {check.fix}." if check.fix else check.message)


def tried(name: str, check: Callable[..., list[Check]], *arguments) -> list[Check]:
    """What a check finds; an error of the user's making is a failed check."""
    try:
        return check(*arguments)
    except (OSError, ValueError) as error:
        return [Check("fail", name, str(error))]
