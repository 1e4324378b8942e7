"""What is said where storage behind a URL refuses, or stays silent.

In: errors of many libraries. Out: three kinds of our own, each with what to do. Invariants: the words hold no password or signature if those
that they are made of hold none.
"""

from typing import NoReturn

REFUSED = {400, 401, 403, 404, 405, 410, 451}  # answers of HTTP that asking again does not change


def refusal_of(error: Exception) -> type[OSError] | None:
    """Whether asking again does not help: because a file is missing, or there is no access to it."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or status in (404, 410):
        return FileNotFoundError
    if isinstance(error, PermissionError) or status in REFUSED or "Credentials" in type(error).__name__:
        return PermissionError
    return None


def refuse(url: str, kind: type[OSError], reason: str, done: str) -> NoReturn:
    """Say that a file is missing, or that there is no access to it. done: read, written or listed."""
    if kind is FileNotFoundError and done == "written":
        raise FileNotFoundError(
            f"{url} cannot be written: there is no such place ({reason}). Make the bucket first, or correct the URL."
        )
    if kind is FileNotFoundError and done == "listed":
        raise FileNotFoundError(f"{url} cannot be listed: there is no such place ({reason}). Correct the URL.")
    if kind is FileNotFoundError:
        raise FileNotFoundError(f"{url} is missing ({reason}). Copy the dataset there again, or correct the URL.")
    hint = "the bucket may be missing, or" if done == "written" else "a signed URL may have expired, or"
    raise PermissionError(
        f"{url} may not be {done} ({reason}): {hint} credentials are needed. Give them where the library of such URLs "
        "looks for them (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws)."
    )


def give_up(url: str, reason: str, patience: float, done: str = "read") -> NoReturn:
    """Say that storage stays silent. patience: seconds that it was asked for."""
    raise ConnectionError(
        f"{url} could not be {done} for {patience:g} s ({reason}). Is the server there? The same command goes on where it was: a run "
        "from its last checkpoint (--data.patience_s waits longer), packing from its last complete shard (--patience)."
    )
