"""A process that has imported what our programs import, and forks to run them: `python tests/support/zygote.py`.

Importing torch takes most of the time of a short run. Each run is a process of its own all the same, with its own
environment, working directory and output files; nothing but the imports is shared, and no thread has been started.

It reads one JSON line a request: {words, cwd, envs, outs, errs, leads}, with one environment and two files for each process, and
whether it leads a process group of its own, which Ctrl-C does not reach; the answer is a line of process numbers. {wait: numbers}
is answered by a line of their exit codes, when all have ended.
"""

import json
import os
import runpy
import sys

import accelerate  # noqa: F401
import matplotlib.figure  # noqa: F401
import scipy.optimize  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import torchvision  # noqa: F401


def become(request: dict, which: int) -> None:
    """In a new process: run the program as if it had been started by itself."""
    if request["leads"]:
        os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(request["envs"][which])
    os.chdir(request["cwd"])
    for name, number in (("outs", 1), ("errs", 2)):
        file = os.open(request[name][which], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (the old one may believe that it is a file)
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    sys.argv = request["words"]
    sys.path[0] = os.path.dirname(request["words"][0])
    runpy.run_path(request["words"][0], run_name="__main__")


def serve() -> None:
    """Answer requests until there are none."""
    for line in iter(sys.stdin.readline, ""):
        request, answer = json.loads(line), []
        for pid in request.get("wait", []):
            answer.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        for which in range(len(request.get("envs", []))):
            answer.append(os.fork())
            if answer[-1] == 0:
                become(request, which)
                return
        print(*answer, flush=True)


if __name__ == "__main__":
    serve()
