"""A hub on the loopback interface: enough of its API for the real huggingface_hub and datasets clients.

Repositories live in memory. What it answers was read from huggingface_hub 2.4's requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"
Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits by id, oldest first, and what branches and tags point to."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, changes: Mapping[str, bytes], ref: str = "main") -> str:
        files = {**self.commits.get(self.refs.get(ref, ""), {}), **changes}
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha


class HubServer(ThreadingHTTPServer):
    """``repos["models/user/name"]`` holds what was pushed; ``status`` makes every answer an error."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.status: int | None = None
        self.yaml: list[str] = []
        self.requests: list[str] = []
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: Mapping[str, bytes], private: bool = False) -> Repo:
        """A repository with one commit; the name begins with ``models/`` or ``datasets/``."""
        self.repos[name] = repo = Repo(private)
        repo.commit(files)
        return repo


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        try:
            if self.server.status is not None:
                raise _RefusedError(self.server.status, "", "out of order")
            self._route(path.split("/"), body)
        except _RefusedError as e:
            headers = {"X-Error-Message": e.message, **({"X-Error-Code": e.code} if e.code else {})}
            self._answer({"error": e.message}, e.status, headers)

    do_GET = do_HEAD = do_POST = _serve  # noqa: N815

    def _route(self, parts: list[str], body: bytes) -> None:
        match parts:
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self.server.yaml.append(json.loads(body)["content"])
                self._answer({"errors": [], "warnings": []})
            case ["api", kind, user, name, "preupload", _]:
                self._repo(kind, user, name, write=True)
                paths = [f["path"] for f in json.loads(body)["files"]]
                self._answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
            case ["api", kind, user, name, "commit", ref]:
                self._commit(kind, user, name, ref, body)
            case ["api", kind, user, name, "tree", ref, *under]:
                self._tree(self._files(kind, user, name, ref)[1], "/".join(under))
            case ["api", kind, user, name, "paths-info", ref]:
                self._paths_info(self._files(kind, user, name, ref)[1], body)
            case ["api", kind, user, name] | ["api", kind, user, name, "revision", _]:
                self._info(kind, user, name, parts[5] if len(parts) > 5 else "main")
            case ["datasets", user, name, "resolve", ref, *file]:
                self._resolve("datasets", user, name, ref, "/".join(file))
            case [user, name, "resolve", ref, *file]:
                self._resolve("models", user, name, ref, "/".join(file))
            case _:
                raise _RefusedError(404, "", f"no such route: {'/'.join(parts)}")

    def _repo(self, kind: str, user: str, name: str, write: bool = False) -> Repo:
        repo = self.server.repos.get(f"{kind}/{user}/{name}")
        if (write or (repo and repo.private)) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _RefusedError(401, "", "Invalid username or password.")
        if repo is None:
            raise _RefusedError(404, "RepoNotFound", "Repository not found")
        return repo

    def _files(self, kind: str, user: str, name: str, ref: str) -> tuple[str, Files]:
        repo = self._repo(kind, user, name)
        sha = repo.refs.get(ref, ref)
        if sha not in repo.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {ref}")
        return sha, repo.commits[sha]

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _RefusedError(401, "", "Invalid username or password.")
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        key = f"{wanted.get('type') or 'model'}s/{name}"
        if key in self.server.repos:
            return self._answer({"url": f"{self.server.url}/{name}"}, 409)
        self.server.add(key, {".gitattributes": b""}, wanted.get("visibility") == "private")
        return self._answer({"url": f"{self.server.url}/{name}"})

    def _commit(self, kind: str, user: str, name: str, ref: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line]
        values = [line["value"] for line in lines if line["key"] == "file"]
        repo = self._repo(kind, user, name, write=True)
        sha = repo.commit({v["path"]: base64.b64decode(v["content"]) for v in values}, ref)
        self._answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{user}/{name}/commit/{sha}"})

    def _info(self, kind: str, user: str, name: str, ref: str) -> None:
        sha, files = self._files(kind, user, name, ref)
        siblings = [{"rfilename": p} for p in files]
        private = self._repo(kind, user, name).private
        about = {"_id": sha[:24], "id": f"{user}/{name}", "sha": sha, "private": private, "tags": [], "downloads": 0}
        self._answer({**about, "siblings": siblings, "lastModified": "2024-01-01T00:00:00.000Z"})

    def _tree(self, files: Files, under: str) -> None:
        inside = {p: c for p, c in files.items() if not under or p.startswith(under + "/")}
        if under and not inside:
            raise _RefusedError(404, "EntryNotFound", f"{under} does not exist")
        folders = {"/".join(p.split("/")[:n]) for p in inside for n in range(1, p.count("/") + 1)} - {under}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in sorted(folders)]
        self._answer(entries + [_entry(p, c) for p, c in sorted(inside.items())])

    def _paths_info(self, files: Files, body: bytes) -> None:
        wanted = json.loads(body)["paths"]
        self._answer([_entry(p, files[p]) for p in wanted if p in files])

    def _resolve(self, kind: str, user: str, name: str, ref: str, file: str) -> None:
        sha, files = self._files(kind, user, name, ref)
        if file not in files:
            raise _RefusedError(404, "EntryNotFound", f"{file} does not exist")
        self._answer(files[file], headers={"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": sha})

    def _answer(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        first, last = 0, len(body) - 1
        if status == 200 and isinstance(content, bytes) and (asked := self.headers.get("Range")):
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last, status = int(low), min(int(high or last), last), 206
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[first : last + 1])

    def log_message(self, *args: Any) -> None:
        """Tests read ``requests`` instead."""


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "oid": _oid(content), "size": len(content), "path": path}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
