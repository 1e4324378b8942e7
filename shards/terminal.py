"""Words on a terminal, whatever its encoding, and how a command ends."""

import argparse
import atexit
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from shards.storage import is_url, without_secrets

END_S = 20.0  # for a process to end in good order after an error


def replace_unprintable() -> None:
    """Whatever the terminal's encoding is: a character that it cannot show is replaced, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a test's or a notebook's stream may have none
            reconfigure(errors="replace")


def user_path(text: str) -> Path:
    """A path of the command line: no shell has expanded the ~ of `--out=~/data`."""
    return Path(text).expanduser()


def user_place(text: str) -> Path | str:
    """The same, or a URL as it is."""
    return text if is_url(text) else user_path(text)


def local_path(text: str) -> Path:
    """A path of the command line that may not be a URL.

    Raises:
        argparse.ArgumentTypeError: it is one.
    """
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{without_secrets(text)} is a URL. Give a file of this machine.")
    return user_path(text)


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Run a command and end its process with its exit code: soon, whatever happened, and whatever its threads are at.

    After an error, a process that has not ended within `END_S` (a thread waits for a disk or a GPU that is gone) says where each
    thread stands and ends all the same: on a cluster it would hold its GPU until the time limit. Ctrl-C ends it at once, since
    what a command writes is whole or not there at any moment.

    The interpreter is not taken down: up to Python 3.13 a thread of C++ that asks for it meanwhile (one of torch's process group,
    to let go of a tensor) aborts the process. What Python does before that is done, as multiprocessing does it for its processes.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        with suppress(OSError):
            print("interrupted", file=sys.stderr)
        _flush()
        os._exit(128 + signal.SIGINT)
    except SystemExit as error:  # also from argparse, after its own words
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    _flush()
    if code:
        with suppress(OSError, ValueError, RuntimeError):  # a stderr that is no file
            faulthandler.dump_traceback_later(END_S, exit=True)
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - waits for the threads that are not daemons
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
