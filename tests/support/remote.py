"""Remote storage of the tests: an HTTP server that can range and can fail, a TCP proxy with faults, an S3 server."""

import http.server
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from support.processes import free_port


class FileServer(http.server.ThreadingHTTPServer):
    """Serves a folder over HTTP.

    requests: how often each file was asked for; sent: bytes of each. fault: is asked before each answer, with the file's name and the
    number of its request, and returns what happens: "" (nothing), a status such as "503", "drop" (half of the answer, then the end),
    "stall" (half, then silence), "short" (half, as if it were all), "wrong" (other bytes), "whole" (no ranges).
    """

    daemon_threads = True

    def __init__(self, folder: Path, fault: Callable[[str, int], str] = lambda name, number: ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault = folder, fault
        self.requests, self.sent, self.over = Counter(), Counter(), threading.Event()

    def handle_error(self, request, client_address) -> None:
        """A client that left is no error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1  # header and body in one packet

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        server, name = self.server, self.path.partition("?")[0].rpartition("/")[2]
        number = 0
        if with_body:
            server.requests[name] += 1
            number = server.requests[name]
        fault, path = server.fault(name, number) if with_body else "", server.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        start, stop, found = 0, len(data), re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and fault != "whole":
            start, stop = int(found[1]), min(int(found[2] or len(data) - 1) + 1, len(data))
        body = data[start:stop]
        if fault == "wrong":
            body = bytes(255 - byte for byte in body)
        half = -(-len(body) // 2)
        self.send_response(206 if found and fault != "whole" else 200)
        self.send_header("Content-Length", str(half if fault == "short" else len(body)))
        self.end_headers()
        if with_body:
            sent = half if fault in ("drop", "stall", "short") else len(body)
            server.sent[name] += sent
            with suppress(OSError):
                self.wfile.write(body[:sent])
                self.wfile.flush()
            if fault == "stall":
                server.over.wait(60)
            if fault in ("drop", "stall"):
                self.close_connection = True


ServerT = TypeVar("ServerT", bound=http.server.ThreadingHTTPServer)


@contextmanager
def running(server: ServerT) -> Iterator[ServerT]:
    """A server in a thread of its own, for a while; `over` is set at its end, for answers that wait."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


@contextmanager
def serving(folder: Path, fault: Callable[[str, int], str] = lambda name, number: "") -> Iterator[FileServer]:
    """A file server, for a while."""
    with running(FileServer(folder, fault)) as server:
        yield server


class Proxy:
    """A TCP proxy that stands between a client and a server.

    fault: "" (nothing), "drop" (a connection ends after `after` bytes of answers), "stall" (it goes silent then), "refuse" (no
    connection comes about, and those that are open end), a status such as "503" (that is the answer). delay: seconds before each request goes on.
    most: faults that happen, before all is well. rate: bytes/s of all answers together; 0 for no limit. passed: bytes of answers so far.
    """

    def __init__(self, port: int):
        self.to, self.fault, self.after, self.rate, self.passed, self.delay = port, "", 100_000, 0.0, 0, 0.0
        self.faults, self.most = 0, sys.maxsize
        self._due, self._lock = 0.0, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self._is_due("refuse"):
                return
            with socket.create_connection(("127.0.0.1", self.to)) as server:
                answered = 0
                while True:
                    for end in select.select([client, server], [], [])[0]:
                        data = end.recv(2**16)
                        if not data:
                            return
                        if end is client and self.fault.isdigit() and self._is_due(self.fault):
                            client.sendall(f"HTTP/1.1 {self.fault} Fault\r\nContent-Length: 0\r\n\r\n".encode())
                            return
                        if end is client and self.delay:
                            time.sleep(self.delay)
                        if self._is_due("refuse"):  # a server that is away ends what is open, too
                            return
                        if end is client:
                            server.sendall(data)
                            continue
                        answered += len(data)
                        is_over = answered > self.after
                        drops, stalls = is_over and self._is_due("drop"), is_over and self._is_due("stall")
                        if drops or stalls:
                            data = data[: max(0, len(data) - (answered - self.after))]
                        client.sendall(data)
                        self.passed += len(data)
                        self._pace(len(data))
                        if stalls:
                            time.sleep(60)
                        if drops or stalls:
                            return

    def _is_due(self, fault: str) -> bool:
        with self._lock:
            is_due = self.fault == fault and self.faults < self.most
            self.faults += is_due
            return is_due

    def _pace(self, n_bytes: int) -> None:
        if self.rate:
            with self._lock:
                self._due = max(self._due, time.monotonic()) + n_bytes / self.rate
                due = self._due
            time.sleep(max(0.0, due - time.monotonic()))


class S3:
    """SeaweedFS's S3 on free ports, with one bucket `shards`."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, int(free_port())
        ports = {name: free_port() for name in ("master", "volume", "filer")}
        grpc = {f"{name}.port.grpc": free_port() for name in ("master", "volume", "filer", "s3")}
        folder.mkdir(parents=True, exist_ok=True)
        options = [f"-dir={folder}", "-s3", "-ip=127.0.0.1", f"-s3.port={self.port}", "-volume.max=20"]
        options += [f"-{name}.port={port}" for name, port in ports.items()]
        options += [f"-{name}={port}" for name, port in grpc.items()]
        # What it would serve on ports of its own choice: two servers of one machine would want the same.
        options += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with open(folder / "weed.log", "w") as log:
            self.process = subprocess.Popen([program, "server", *options], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status", timeout=2).close()
                break
            assert self.process.poll() is None, (folder / "weed.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (folder / "weed.log").read_text()[-2000:]
            time.sleep(0.2)

    def files(self, port: int = 0):
        import s3fs

        options = {"endpoint_url": f"http://127.0.0.1:{port or self.port}"}
        return s3fs.S3FileSystem(key="any", secret="any", client_kwargs=options, skip_instance_cache=True)

    def put(self, folder: Path, name: str) -> str:
        """Copy a folder there, with all below; its URL."""
        files = self.files()
        if not files.exists("shards"):
            files.mkdir("shards")
        for path in folder.rglob("*"):
            if path.is_file():
                files.put_file(str(path), f"shards/{name}/{path.relative_to(folder).as_posix()}")
        return f"s3://shards/{name}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def s3_variables(port: int) -> dict[str, str]:
    """What a process needs to find an S3 server of this machine."""
    found = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    return found | {"AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}
