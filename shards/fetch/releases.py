"""Where public data sets are published, and which of their files packing needs.

In: a release and a server. Out: its files, as `PublicFile`. Invariants: only files that are known by name are taken, so no server decides
where something is written; what a server says is checked for its shape.

Sources: Dataverse's native and data access API (guides.dataverse.org/en/latest/api). A table that Dataverse has converted (`.tab`) is
asked for as it was uploaded (`format=original`), since the checksum that is listed is that of the upload.
"""

import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass

from shards.fetch.download import PublicFile
from shards.fetch.web import read_size, read_text
from shards.public_data import CC_BY_NC, HAM10000_CITATION, ISIC2018_CITATION
from shards.shape import misfit, parse_json
from shards.storage import without_secrets

TABLES = ("", ".csv", ".tab")  # endings of a table of HAM10000, as `ham10000.METADATA` has them
DATA_FILE = {"id": int, "filename": str, "filesize": int, "checksum": {"type": str, "value": str}}
DATASET = {"data": {"latestVersion": {"files": [{"restricted": bool, "dataFile": DATA_FILE}]}}}
ALGORITHMS = {
    "MD5": "md5",
    "SHA-1": "sha1",
    "SHA-256": "sha256",
    "SHA-512": "sha512",
}  # Dataverse's names and hashlib's


@dataclass(frozen=True)
class Release:
    """A published data set.

    name: on the command line. title: as people call it. server: where it is. stems: its files that packing needs, without their endings. list_files: of a release and a
    server, within a patience in seconds. page: for people. next_command: with FOLDER where the files are.
    """

    name: str
    title: str
    server: str
    stems: tuple[str, ...]
    list_files: "Callable[[Release, str, float], list[PublicFile]]"
    page: str
    citation: str
    license: str
    next_command: str


def list_dataverse(release: Release, server: str, seconds: float) -> list[PublicFile]:
    """The files of a data set in a Dataverse, named by the DOI at the end of its page.

    Raises:
        ValueError: an answer that is none of this API, or without a file that packing needs.
        OSError: as `web.open_url`.
    """
    doi = release.page.removeprefix("https://doi.org/")
    url = f"{server}/api/datasets/:persistentId/?persistentId=doi:{doi}"
    try:
        answer = parse_json(read_text(url, seconds))
        problem = misfit(answer, DATASET)
    except ValueError as error:
        answer, problem = {}, str(error)
    if problem:
        raise ValueError(
            f"{without_secrets(url)} does not answer as Dataverse does ({problem}). Correct --server, or download the files from "
            f"{release.page}, unpack them and pack that folder."
        )
    listed = answer["data"]["latestVersion"]["files"]
    found = {_stem(entry["dataFile"]["filename"]): entry for entry in listed}
    if missing := [stem for stem in release.stems if stem not in found]:
        names = ", ".join(entry["dataFile"]["filename"][:80] for entry in listed[:20])
        raise ValueError(
            f"{release.page} at {without_secrets(server)} has no {missing[0]}. It has: {names}. Was it reorganised? Download "
            "what you need with a browser, unpack it and pack that folder."
        )
    if closed := [stem for stem in release.stems if found[stem]["restricted"]]:
        raise PermissionError(
            f"{closed[0]} of {release.page} is restricted by now. Ask there for access, download it with a browser, "
            "unpack it and pack that folder."
        )
    return [_of_dataverse(stem, found[stem]["dataFile"], server) for stem in release.stems]


def list_bucket(release: Release, server: str, seconds: float) -> list[PublicFile]:
    """The archives of a release in a folder behind HTTPS that publishes no list and no checksums: their sizes are asked for.

    Raises:
        OSError: as `web.open_url`.
    """
    files = []
    for name in (f"{stem}.zip" for stem in release.stems):
        size, etag = read_size(f"{server}/{name}", seconds)
        files.append(PublicFile(name, f"{server}/{name}", size, etag=etag))
    return files


def _of_dataverse(stem: str, file: dict, server: str) -> PublicFile:
    kind = ALGORITHMS.get(file["checksum"]["type"].upper())
    checksum = (kind, file["checksum"]["value"]) if kind else None
    url = f"{server}/api/access/datafile/{file['id']}"
    if file["filename"].endswith(".zip"):
        return PublicFile(f"{stem}.zip", url, file["filesize"], checksum)
    if "originalFileFormat" not in file:  # a table that was not converted
        return PublicFile(f"{stem}{_ending(file['filename'])}", url, file["filesize"], checksum)
    original, size = file.get("originalFileName"), file.get("originalFileSize")
    ending = _ending(original if isinstance(original, str) else "")
    size = size if isinstance(size, int) and size >= 0 else None
    return PublicFile(f"{stem}{ending or '.csv'}", f"{url}?format=original", size, checksum)


def _stem(name: str) -> str:
    return name.removesuffix(".zip").removesuffix(_ending(name))


def _ending(name: str) -> str:
    """The ending of a table's name, if packing knows it."""
    return next((ending for ending in TABLES if ending and name.endswith(ending)), "")


def check_server(url: str) -> str:
    """A server as the command line names it, without a slash at its end.

    Raises:
        ValueError: no URL of the web, or with credentials in it.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or any(map(str.isspace, url)):
        raise ValueError(f"--server must be a URL such as https://example.org. Got {without_secrets(url)!r}.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"--server takes no credentials and no query: they would end in logs. Got {without_secrets(url)} and more. "
            "Download such files with the tool of their server, unpack them and pack that folder."
        )
    return url.rstrip("/")


_ALL = (
    Release(
        "ham10000",
        "HAM10000",
        "https://dataverse.harvard.edu",
        ("HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_metadata"),
        list_dataverse,
        "https://doi.org/10.7910/DVN/DBW86T",
        HAM10000_CITATION,
        CC_BY_NC,
        "python -m shards pack FOLDER data/ham10000",
    ),
    Release(
        "isic2018",
        "test images of ISIC 2018, task 3",
        "https://isic-archive.s3.amazonaws.com/challenges/2018",
        ("ISIC2018_Task3_Test_Input", "ISIC2018_Task3_Test_GroundTruth"),
        list_bucket,
        "https://challenge.isic-archive.com/data/#2018",
        ISIC2018_CITATION,
        CC_BY_NC,
        "python -m shards pack PATH/TO/HAM10000 data/isic2018 --protocol isic2018 --test-source FOLDER",
    ),
)
RELEASES = {release.name: release for release in _ALL}
