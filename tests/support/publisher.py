"""A publisher of data sets: an HTTP server that speaks as Dataverse and as a bucket of S3 do, and fails when a test says so."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.remote import running

DOI = "doi:10.7910/DVN/DBW86T"


class Publisher(http.server.ThreadingHTTPServer):
    """Serves a folder: its files at /NAME with ETag, Range and If-Range, and as a Dataverse that redirects there.

    listing: of the data set, as Dataverse gives it; a test may change it. fault: is asked before each answer of a file, with its name and the
    number of its request, and returns what happens: "" (nothing), a status such as "503", "drop" (half, then the end), "stall"
    (half, then silence), "wrong" (other bytes), "whole" (no ranges). etags: False for a server that gives none. sent: bytes of each
    file; headers: of each request of a file.
    """

    daemon_threads = True

    def __init__(self, folder: Path, fault: Callable[[str, int], str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.etags, self.refusal = folder, fault, True, ""
        self.requests, self.sent, self.headers, self.over = Counter(), Counter(), [], threading.Event()
        self.listing = [describe(path, 100 + n) for n, path in enumerate(sorted(folder.iterdir()))]

    def handle_error(self, request, client_address) -> None:
        """A client that left is no error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_file(urllib.parse.urlsplit(self.path).path.strip("/"), with_body=False)

    def do_GET(self) -> None:
        server, parts = self.server, urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parts.query)
        if parts.path == "/api/datasets/:persistentId/" and query.get("persistentId") == [DOI] and not server.refusal:
            self.send(200, json.dumps({"status": "OK", "data": {"latestVersion": {"files": server.listing}}}).encode())
        elif parts.path.startswith("/api/"):
            found = [one for one in server.listing if parts.path == f"/api/access/datafile/{one['dataFile']['id']}"]
            if not found or server.refusal:
                message = server.refusal or "Dataset with Persistent ID not found."
                self.send(403 if server.refusal else 404, json.dumps({"status": "ERROR", "message": message}).encode())
                return
            file = found[0]["dataFile"]
            original = query.get("format") == ["original"] and file.get("originalFileName")
            self.send_response(303)
            self.send_header("Location", f"{server.url}/{original or file['filename']}?X-Amz-Signature=secret")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_file(parts.path.strip("/"), with_body=True)

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str, with_body: bool) -> None:
        server, path, fault = self.server, self.server.folder / name, ""
        if with_body:
            server.requests[name] += 1
            server.headers.append(dict(self.headers))
            fault = server.fault(name, server.requests[name])
        if fault.isdigit() or not path.is_file():
            self.send(int(fault or 404), b"")
            return
        data = path.read_bytes()
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        is_same = self.headers.get("If-Range", etag) == etag
        start = int(found[1]) if found and is_same and fault != "whole" else 0
        if start >= len(data):
            self.send(416, b"")
            return
        body = data[start:] if fault != "wrong" else bytes(255 - byte for byte in data[start:])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if server.etags:
            self.send_header("ETag", etag)
        self.end_headers()
        if with_body:
            sent = -(-len(body) // 2) if fault in ("drop", "stall") else len(body)
            with suppress(OSError):
                self.wfile.write(body[:sent])
                self.wfile.flush()
            server.sent[name] += sent
            if fault == "stall":
                server.over.wait(60)
            self.close_connection = fault in ("drop", "stall")


def describe(path: Path, number: int) -> dict:
    """A file as Dataverse lists it; it has converted a .csv to a .tab of another size, and lists the checksum of the .csv."""
    data = path.read_bytes()
    checksum = {"type": "MD5", "value": hashlib.md5(data).hexdigest()}
    file = {"id": number, "filename": path.name, "filesize": len(data), "checksum": checksum}
    if path.suffix == ".csv":
        original = {"originalFileName": path.name, "originalFileSize": len(data), "originalFileFormat": "text/csv"}
        file |= {"filename": f"{path.stem}.tab", "filesize": len(data) + 17, **original}
    return {"label": file["filename"], "restricted": False, "dataFile": file}


@contextmanager
def publishing(folder: Path, fault: Callable[[str, int], str] = lambda name, number: "") -> Iterator[Publisher]:
    """A publisher, for a while."""
    with running(Publisher(folder, fault)) as server:
        yield server


def zip_files(archive: Path, files: dict[str, bytes]) -> None:
    """An archive of these files, by name."""
    with zipfile.ZipFile(archive, "w") as opened:
        for name, data in files.items():
            opened.writestr(name, data)
