"""A Hugging Face hub on a local port: as much of its API as huggingface_hub needs to look up and download a model."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    """Only a request with a token may read it."""
    sha: str = SHA
    pipeline_tag: str = "text-generation"


@dataclass
class FakeHub:
    """The repositories that it serves, what it was asked, and how it misbehaves."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range header, in order."""
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """File name -> for each coming download, after how many bytes the connection breaks."""
    failures: dict[str, list[int]] = field(default_factory=dict)
    """File name -> statuses with which its coming downloads are answered."""

    def downloads(self, name: str) -> list[str]:
        """Range headers of the GETs of a file's content."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(f"/{name}")]


@contextmanager
def served(**repositories: Repository) -> Iterator[FakeHub]:
    """A running hub; keyword ``org__name`` is the repository ``org/name``."""
    hub = FakeHub({name.replace("__", "/"): repository for name, repository in repositories.items()})

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.state.requests.append((self.command, path, self.headers.get("Range", "")))
        for repo_id, repository in self.state.repositories.items():
            if path.startswith((f"/api/models/{repo_id}", f"/{repo_id}/resolve/")):
                if repository.gated and "Authorization" not in self.headers:
                    return self._refuse(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
                if path.startswith("/api/"):
                    return self._api(path.removeprefix(f"/api/models/{repo_id}"), repo_id, repository)
                revision, _, name = path.removeprefix(f"/{repo_id}/resolve/").partition("/")
                return self._file(revision, name, repository)
        # As the real one does, so as not to tell which private repositories exist.
        self._refuse(401, "RepoNotFound", "Repository not found")

    def _api(self, rest: str, repo_id: str, repository: Repository) -> None:
        if rest.startswith("/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in repository.files.items()
            ]
            return self._json(entries)
        revision = rest.removeprefix("/revision/") if rest else "main"
        if revision not in ("main", repository.sha):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        self._json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": repository.sha,
                "pipeline_tag": repository.pipeline_tag,
                "tags": [],
                "siblings": [{"rfilename": name} for name in repository.files],
            }
        )

    def _file(self, revision: str, name: str, repository: Repository) -> None:
        if self.command == "GET" and self.state.failures.get(name):
            return self._refuse(self.state.failures[name].pop(0), "", "out of order")
        if revision not in ("main", repository.sha):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in repository.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content = repository.files[name]
        begin = 0
        if self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.sha)
        self.send_header("Accept-Ranges", "bytes")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[begin:]
        if self.state.cut_after.get(name):
            self.wfile.write(body[: self.state.cut_after[name].pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
