"""As much of the Hub as an upload needs: repositories, the question what goes through LFS, LFS itself, a commit."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class UploadServer:
    """A context manager; what arrived is in `repos`: {OWNER/NAME: {file: bytes}}."""

    def __init__(self, token: str = "hf_good") -> None:
        self.token, self.repos, self.private, self.commits = token, {}, {}, 0
        self.blobs: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.refuse: int | None = None  # a status for every request
        server = self

        class Handler(_Handler):
            owner = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> UploadServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: UploadServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def _handle(self) -> None:
        owner, path = self.owner, urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if owner.refuse:
            return self._send(owner.refuse, {"error": "no"})
        if match := re.match(r"^/blob/(\w+)$", path):
            owner.blobs[match[1]] = body
            return self._send(200, {})
        if self.headers.get("Authorization") != f"Bearer {owner.token}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._send(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            owner.repos.setdefault(name, {})
            owner.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return self._send(200, {"url": f"{owner.root}/{name}", "name": name})
        if match := re.match(r"^/api/models/([^/]+/[^/]+)/revision/main$", path):  # clients before version 1 ask
            return self._send(200, {"id": match[1], "sha": "0" * 40, "siblings": []})
        if match := re.match(r"^/api/models/([^/]+/[^/]+)/preupload/main$", path):
            files = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            answer = [{"path": p, "uploadMode": mode, "shouldIgnore": False, "oid": None} for p, mode in modes]
            return self._send(200, {"files": answer})
        if re.match(r"^/[^/]+/[^/]+\.git/info/lfs/objects/batch$", path):
            objects = json.loads(body)["objects"]
            answer = [
                {**o, "actions": {"upload": {"href": f"{owner.root}/blob/{o['oid']}", "header": {}}}} for o in objects
            ]
            return self._send(200, {"transfer": "basic", "objects": answer})
        if match := re.match(r"^/api/models/([^/]+/[^/]+)/commit/main$", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines() if line])
            owner.commits += 1
            url = f"{owner.root}/{match[1]}/commit/{'0' * 40}"
            return self._send(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
        owner.unknown.append(path)
        return self._send(404, {"error": f"there is no {path}"})

    do_GET = do_POST = do_PUT = _handle  # noqa: N815

    def _commit(self, repo: str, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            value = row["value"]
            if row["key"] == "file":
                self.owner.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                self.owner.repos[repo][value["path"]] = self.owner.blobs[value["oid"]]

    def _send(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
