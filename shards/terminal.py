"""Words on a terminal, whatever its encoding."""

import sys


def replace_unprintable() -> None:
    """Whatever the terminal's encoding is: a character that it cannot show is replaced, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a test's or a notebook's stream may have none
            reconfigure(errors="replace")
