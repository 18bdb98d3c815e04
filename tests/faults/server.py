"""A server on 127.0.0.1 that misbehaves on purpose: plain HTTP with ranges, and enough of the Hub's API for the
real `huggingface_hub` client (dataset info, tree, paths-info, resolve with a redirect to a store of its own).

    with FaultServer() as server:
        server.files["shard.parquet"] = data                 # at server.url("shard.parquet")
        server.push("owner/name", {"README.md": ..., ...})   # a commit; main moves to it
        server.fault = every(3, Drop(after=1000))            # what happens to which request

Every request is recorded with the bytes that were sent for it. Nothing sleeps unless a `Slow` asks for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, file_download, hf_api


@dataclass
class Request:
    """One request as it came, and what was sent for it."""

    method: str
    path: str
    range: str | None
    headers: dict[str, str]
    number: int = 0
    status: int = 0
    sent: int = 0


@dataclass
class Status:
    """Answer with a status and no body."""

    code: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Drop:
    """Break the connection after so many bytes of the body."""

    after: int = 0


@dataclass
class Slow:
    """Send the body in small chunks with a pause before each."""

    pause: float
    chunk: int = 1024


@dataclass
class Length:
    """Announce a Content-Length that is wrong by so many bytes; the connection ends with the body."""

    wrong_by: int


@dataclass
class Flip:
    """Flip one bit of the body."""

    at: int = 0


@dataclass
class NoRanges:
    """Send the whole file with 200, whatever range is asked."""


Fault = Status | Drop | Slow | Length | Flip | NoRanges
Policy = Callable[[Request], Fault | None]


def every(n: int, fault: Fault, *, of: str = "") -> Policy:
    """Each n-th request whose path contains `of`."""
    lock, seen = threading.Lock(), [0]

    def policy(request: Request) -> Fault | None:
        if of not in request.path:
            return None
        with lock:
            seen[0] += 1
            return fault if seen[0] % n == 0 else None

    return policy


def first(n: int, *faults: Fault, of: str = "") -> Policy:
    """The first n requests whose path contains `of`, the faults in turn."""
    lock, seen = threading.Lock(), [0]

    def policy(request: Request) -> Fault | None:
        if of not in request.path:
            return None
        with lock:
            seen[0] += 1
            return faults[(seen[0] - 1) % len(faults)] if seen[0] <= n else None

    return policy


class FaultServer:
    """The server; a context manager."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.fault: Policy | None = None
        self.requests: list[Request] = []
        self.redirect_uses = 10**9  # how often one redirect's target answers before it has expired
        self.token: str | None = None  # asked for at the Hub's paths when set
        self._uses: dict[str, int] = {}
        self._hashed: dict[int, tuple[bytes, str]] = {}
        self._count = 0
        self._lock = threading.Lock()
        server = self

        class Handler(_Handler):
            owner = server

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def root(self) -> str:
        """http://127.0.0.1:PORT, also the HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def sent(self) -> int:
        """Bytes of bodies sent so far."""
        return sum(request.sent for request in self.requests)

    def url(self, name: str) -> str:
        """Address of one of `files`."""
        return f"{self.root}/files/{name}"

    def push(self, repo: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Make a commit with exactly these files and move the branch to it."""
        core = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})
        sha = hashlib.sha1(f"{repo} {core}".encode()).hexdigest()
        self.commits.setdefault(repo, {})[sha] = dict(files)
        self.branches.setdefault(repo, {})[branch] = sha
        return sha

    def etag_of(self, data: bytes) -> str:
        """A strong ETag, hashed once for the same object."""
        with self._lock:
            if id(data) not in self._hashed:
                self._hashed[id(data)] = (data, f'"{hashlib.md5(data).hexdigest()}"')
            return self._hashed[id(data)][1]

    def reset(self) -> None:
        """Forget the requests so far."""
        with self._lock:
            self.requests.clear()

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def record(self, request: Request) -> Fault | None:
        """Note a request and choose its fault."""
        with self._lock:
            self._count += 1
            request.number = self._count
            self.requests.append(request)
        return self.fault(request) if self.fault else None

    def redirect(self, sha: str, path: str) -> str:
        """A fresh address in the store for a file; the store is another host than the Hub."""
        with self._lock:
            key = f"{len(self._uses):08d}"
            self._uses[key] = 0
        return f"http://localhost:{self._http.server_address[1]}/store/{key}/{sha}/{path}"

    def spend(self, key: str) -> bool:
        """Whether a store address still answers."""
        with self._lock:
            self._uses[key] = self._uses.get(key, 10**9) + 1
            return self._uses[key] <= self.redirect_uses


def as_hub(server: FaultServer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Make the server the Hub of this process, whose client has read its environment already."""
    template = server.root + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.root)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Clients before version 1 keep copies of both.
    monkeypatch.setattr(hf_api.api, "endpoint", server.root)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


class _Quiet(ThreadingHTTPServer):
    """Clients that are killed break their connections; that is no news here."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.request_seen = Request(self.command, self.path, self.headers.get("Range"), dict(self.headers.items()))
        fault = self.owner.record(self.request_seen)
        with contextlib.suppress(ConnectionError):
            if isinstance(fault, Status):
                self._send(fault.code, b"", fault.headers)
            else:
                self._route(fault)

    def _route(self, fault: Fault | None) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/files/"):
            name = path.removeprefix("/files/")
            if name not in self.owner.files:
                return self._send(404, b"")
            data = self.owner.files[name]
            etag = self.owner.etags.get(name) or self.owner.etag_of(data)
            return self._file(data, etag, fault)
        if match := re.match(r"^/store/(\d+)/(\w+)/(.*)$", path):
            if not self.owner.spend(match[1]):
                return self._send(403, b"expired")
            data = next(c[match[2]][match[3]] for c in self.owner.commits.values() if match[2] in c)
            return self._file(data, f'"store-{len(data)}"', fault)
        if self.owner.token and self.headers.get("Authorization") != f"Bearer {self.owner.token}":
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if match := re.match(r"^/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)$", path):
            return self._resolve(match[1], match[2], match[3], fault)
        pattern = r"^/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?$"
        if match := re.match(pattern, path):
            return self._api(match[1], match[2] or "revision", match[3] or "main", match[4] or "")
        return self._send(404, b"")

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision means; answers itself where there is none."""
        if repo not in self.owner.branches:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        sha = self.owner.branches[repo].get(revision, revision)
        if sha not in self.owner.commits[repo]:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return sha, self.owner.commits[repo][sha]

    def _resolve(self, repo: str, revision: str, path: str, fault: Fault | None) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return None
        sha, files = found
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = files[path]
        headers = {
            "X-Repo-Commit": sha,
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "Location": self.owner.redirect(sha, path),
        }
        self._send(302, b"", headers)
        return None

    def _api(self, repo: str, question: str, revision: str, path: str) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return None
        sha, files = found
        if question == "revision":
            return self._json(
                {
                    "id": repo,
                    "sha": sha,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "cardData": _card(files.get("README.md", b"")),
                    "siblings": [{"rfilename": name} for name in files],
                }
            )
        if question == "paths-info":
            asked = parse_qs(self.body.decode()).get("paths", [])
            if not asked:
                asked = json.loads(self.body or b"{}").get("paths", [])
            entries = []
            for name in asked:
                if name in files:
                    entries.append(_entry(name, files[name]))
                elif any(other.startswith(f"{name}/") for other in files):
                    entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
            return self._json(entries)
        below = [name for name in files if not path or name.startswith(f"{path}/")]
        if path and not below:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        self._json([_entry(name, files[name]) for name in sorted(below)])
        return None

    def _file(self, data: bytes, etag: str, fault: Fault | None) -> None:
        condition = self.headers.get("If-Match")
        if condition and condition not in ("*", etag):
            return self._send(412, b"")
        code, a, b = 200, 0, len(data) - 1
        asked = None if isinstance(fault, NoRanges) else self.headers.get("Range")
        if asked and (match := re.match(r"^bytes=(\d*)-(\d*)$", asked)):
            if match[1]:
                a, b = int(match[1]), min(int(match[2]) if match[2] else b, b)
            else:
                a = max(len(data) - int(match[2]), 0)
            if a > b:
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            code = 206
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        if code == 206:
            headers["Content-Range"] = f"bytes {a}-{b}/{len(data)}"
        self._send(code, data[a : b + 1], headers, fault)
        return None

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None, fault: Fault | None = None) -> None:
        self.request_seen.status = code
        if isinstance(fault, Flip) and body:
            at = fault.at % len(body)
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        length = len(body) + (fault.wrong_by if isinstance(fault, Length) else 0)
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(max(length, 0)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(fault, Drop):
            body = body[: fault.after]
        step = fault.chunk if isinstance(fault, Slow) else 1 << 16
        for at in range(0, len(body), step):
            if isinstance(fault, Slow):
                time.sleep(fault.pause)
            self.wfile.write(body[at : at + step])
            self.request_seen.sent += len(body[at : at + step])
        if isinstance(fault, (Drop, Length)):
            self.wfile.flush()
            self.close_connection = True


def _entry(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha256(data).hexdigest()
    blob = hashlib.sha1(data).hexdigest()
    lfs = {"oid": oid, "size": len(data), "pointerSize": 134}
    return {"type": "file", "oid": blob, "size": len(data), "path": name, "lfs": lfs}


def _card(readme: bytes) -> dict[str, Any] | None:
    match = re.match(r"^---\n(.*?)\n---", readme.decode("utf-8", "replace"), re.DOTALL)
    return yaml.safe_load(match[1]) if match else None
