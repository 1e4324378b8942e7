"""launch/train.py as on a system that is not Linux: `python tests/support/elsewhere.py SYSTEM --config ...`.

SYSTEM is darwin or win32, as `sys.platform` says it. Names that such a Python lacks are taken away, once the libraries have been
imported: those look at the system as it is.
"""

import os
import shutil
import signal
import sys

import accelerate  # noqa: F401
import matplotlib.figure  # noqa: F401
import psutil  # noqa: F401
import scipy.optimize  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import torchvision  # noqa: F401

MISSING = {
    "darwin": ["sched_getaffinity", "posix_fadvise"],
    "win32": ["sched_getaffinity", "posix_fadvise", "pread", "killpg", "fork"],
}
SIGNALS = {"darwin": [], "win32": ["SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL"]}


def hide(system: str) -> None:
    """Take away what a system lacks; on Windows no folder can be opened as a file, either."""
    sys.platform = system
    for module, names in ((os, MISSING[system]), (signal, SIGNALS[system])):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    if system == "win32":
        plain = os.open

        def refuse_folders(path, *rest, **more) -> int:
            if os.path.isdir(path):
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *rest, **more)

        os.open, shutil._use_fd_functions = refuse_folders, False


if __name__ == "__main__":
    hide(sys.argv.pop(1))
    from launch.train import main

    sys.exit(main())
