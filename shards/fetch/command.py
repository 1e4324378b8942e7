"""`python -m shards fetch`: a public data set, downloaded and unpacked as `python -m shards pack` reads it.

In: the name of a release and a folder. Out: its images and tables there, and `fetched.json`, which says where they are from. Invariants: the same
command continues after a kill at any moment; nothing that the command did not bring is changed or removed.
"""

import argparse
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.fetch.download import PublicFile, check, discard, download
from shards.fetch.fetched import Download, Fetched, find_changed, read_fetched
from shards.fetch.releases import RELEASES, Release, check_server
from shards.fetch.unzip import Listed, crc32, list_archive, unpack
from shards.files import free_name
from shards.locks import HAS_LOCKS, open_alone
from shards.storage import without_secrets
from shards.terminal import user_path

PATIENCE_S = 300.0


def add_fetch(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = command.add_argument
    add("release", choices=RELEASES, help="; ".join(f"{name}: {one.title}" for name, one in RELEASES.items()))
    add("folder", type=user_path, help="folder to fill; the same command continues what was interrupted")
    add(
        "--server",
        default="",
        help="where a copy of the release is: URL of a Dataverse, or of a folder with the archives",
    )
    add("--keep", action="store_true", help="keep the archives after they are unpacked")
    add("--verify", action="store_true", help="of what is there already, compare the content, too, not the size alone")
    add(
        "--patience",
        type=float,
        default=PATIENCE_S,
        help=f"seconds without a new byte until it gives up; it tries again with growing pauses (default {PATIENCE_S:g})",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    release, folder = RELEASES[options.release], options.folder
    server = check_server(options.server or release.server)
    print(f"{release.title}: {release.page}, licence {release.license}: no commercial use")
    try:
        with _alone(folder):
            new, n_files = fetch(release, folder, server, options.patience, options.keep, options.verify)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"The disk of {folder} is full. What came is kept: free space there, and run the same command again."
            ) from error
        raise
    print(f"{folder}: complete, {n_files} files" + ("" if new else "; nothing to do"))
    print(f"citation: {release.citation}")
    print(f"next: {release.next_command.replace('FOLDER', shlex.quote(str(folder)))}")
    return 0


def fetch(
    release: Release, folder: Path, server: str, seconds: float, keep: bool = False, verify: bool = False
) -> tuple[int, int]:
    """Bring a release into a folder.

    Args:
        seconds: without a new byte, until the server is given up. keep: the archives stay. verify: of files that are there already, the
            content is read.

    Returns:
        how many downloads were new, and how many files are there.

    Raises:
        ValueError, OSError: as `list_files` of the release, `download` and `unpack`; or too little room on the disk.
    """
    fetched = read_fetched(folder) or Fetched(release.name, release.page, release.license, release.citation)
    if fetched.release != release.name:
        raise ValueError(f"{folder} holds {fetched.release}. Give another folder for {release.name}.")
    intact = {name for name, one in fetched.downloads.items() if _is_intact(folder, name, one, verify)}
    for name in intact:
        _finish(folder / name, fetched.downloads[name])
    if {name.partition(".")[0] for name in intact} == set(release.stems):
        return 0, fetched.n_files
    missing = [file for file in release.list_files(release, server, seconds) if file.name not in intact]
    _refuse_strangers(folder, missing, fetched)
    _check_space(folder, missing, keep)
    for file in missing:
        path = folder / file.name
        with _bar(file.size, "B", file.name) as progress:
            _bring(path, file, seconds, progress)
        files = _unpack(path, is_ours=file.name in fetched.downloads)
        checksum = " ".join(file.checksum) if file.checksum else ""
        fetched.downloads[file.name] = Download(without_secrets(file.url), checksum, file.etag, keep, files)
        fetched.write(folder)
        _finish(path, fetched.downloads[file.name])
    return len(missing), fetched.n_files


def _bring(path: Path, file: PublicFile, seconds: float, progress: Callable[[int], None]) -> None:
    """Download a file, unless it lies there: from a call that was killed later, or because somebody put it there."""
    if path.exists():
        check(path, file)
        discard(path.with_name(f"{path.name}.part"))  # a kill may have left its note
        progress(path.stat().st_size)
    else:
        download(file, path, seconds, progress)


def _unpack(path: Path, is_ours: bool) -> Listed:
    """Unpack a download, if it is an archive. What is there then, by its path in the folder."""
    if path.suffix != ".zip":
        return {path.name: (path.stat().st_size, crc32(path))}
    folder = path.with_suffix("")
    listed = list_archive(path, folder.name)
    _require(path.parent, sum(size for size, _ in listed.values()))
    with _bar(len(listed), " files", f"unpacking {path.name}") as progress:
        listed = unpack(path, folder, is_ours, progress)
    return {f"{folder.name}/{name}": found for name, found in listed.items()}


def _finish(path: Path, done: Download) -> None:
    """Remove an archive whose files are there."""
    if path.suffix == ".zip" and not done.is_kept:
        path.unlink(missing_ok=True)


def _is_intact(folder: Path, name: str, done: Download, verify: bool) -> bool:
    changed = find_changed(folder, done, verify)
    if changed:
        print(f"{name}: {len(changed)} of its files are missing or changed, as {changed[0]}; it is fetched again")
        if changed == [name] and (folder / name).exists():  # a table that somebody edited, it may be
            aside = free_name(folder / f"{name}.changed")
            os.replace(folder / name, aside)
            print(f"{aside} is the one that was there")
    return not changed


def _refuse_strangers(folder: Path, files: list[PublicFile], fetched: Fetched) -> None:
    """Before gigabytes come: a folder is in the place of one to come, and this command did not make it."""
    for file in files:
        archive, target = folder / file.name, folder / file.name.removesuffix(".zip")
        if archive != target and target.exists() and not archive.exists() and file.name not in fetched.downloads:
            raise FileExistsError(
                f"{target} is there, and was not fetched. If it is complete, pack {folder}; if not, remove it, or give another folder."
            )


def _check_space(folder: Path, files: list[PublicFile], keep: bool) -> None:
    """Images hardly shrink in an archive: for a while, the largest lies there twice; with `keep`, each."""
    there = (folder / f"{file.name}{ending}" for file in files for ending in ("", ".part"))
    archives = [file.size or 0 for file in files if file.name.endswith(".zip")]
    twice = sum(archives) if keep else max(archives, default=0)
    _require(folder, sum(file.size or 0 for file in files) + twice - sum(_size(path) for path in there))


def _require(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OSError: naming what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} needs {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free there. Free {(needed - free) / 1e9:.2f} GB, or "
            "give a folder on another disk; what has come may be moved there."
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process of this machine fetches into the folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The folder {folder} cannot be made ({error}). Give another one.") from error
    path = folder / ".fetch.lock"
    file = open_alone(path) if HAS_LOCKS else -1
    if file is None:
        raise ValueError(f"Another process is fetching into {folder}. Wait for it, or stop it.")
    try:
        yield
    finally:
        if file >= 0:
            path.unlink(missing_ok=True)
            os.close(file)


@contextmanager
def _bar(total: int | None, unit: str, title: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, which is told how much is there."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=title, disable=None) as bar:

        def show(there: int) -> None:
            bar.update(there - bar.n)

        yield show
