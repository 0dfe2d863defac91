"""A Hugging Face hub on a local port: as much of its API as huggingface_hub needs to look up and download a model."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    large: tuple[str, ...] = (".safetensors",)
    """How the names of files end that are kept outside of git, and are named by their sha256."""
    on_other_host: bool = False
    """Large files are not served here: a redirect leads to another host."""

    def is_large(self, name: str) -> bool:
        return name.endswith(self.large)

    def etag(self, name: str) -> str:
        content = self.files[name]
        if self.is_large(name):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


@dataclass
class FakeHub:
    """The repositories that it serves, what it was asked, and how it misbehaves."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    other_url: str = ""
    """The host that has the content of files which are not served here."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range header, in order; of both hosts."""
    other_headers: list[dict[str, str]] = field(default_factory=list)
    """Of the requests to the other host, names in lower case."""
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """File name -> for each coming download, after how many bytes the connection breaks."""
    short: dict[str, list[int]] = field(default_factory=dict)
    """File name -> for each coming download, after how many bytes it ends as if that were all."""
    failures: dict[str, list[int]] = field(default_factory=dict)
    """File name -> statuses with which its coming downloads are answered."""
    stall_after: dict[str, list[int]] = field(default_factory=dict)
    """File name -> for each coming download, after how many bytes it waits for ``go_on``."""
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    knows_ranges: bool = True

    def downloads(self, name: str) -> list[str]:
        """Range headers of the GETs of a file's content."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(f"/{name}")]


@contextmanager
def served(**repositories: Repository) -> Iterator[FakeHub]:
    """A running hub; keyword ``org__name`` is the repository ``org/name``."""
    hub = FakeHub({name.replace("__", "/"): repository for name, repository in repositories.items()})

    class Handler(_Handler):
        state = hub

    class OtherHandler(_OtherHandler):
        state = hub

    with _running(Handler) as hub.url, _running(OtherHandler) as hub.other_url:
        yield hub
        hub.go_on.set()


@contextmanager
def _running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
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
        about = {"ETag": f'"{repository.etag(name)}"', "X-Repo-Commit": repository.sha}
        if repository.on_other_host and repository.is_large(name):
            size = str(len(repository.files[name]))
            self.send_response(302)
            for key, value in about.items():
                self.send_header(key.replace("ETag", "X-Linked-ETag"), value)
            self.send_header("X-Linked-Size", size)
            self.send_header("Location", f"{self.state.other_url}/{repository.etag(name)}/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._content(name, repository.files[name], about)

    def _content(self, name: str, content: bytes, about: dict[str, str]) -> None:
        begin = 0
        if self.headers.get("Range") and self.state.knows_ranges:
            begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        for key, value in about.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        body = content[begin:]
        if self.command == "GET" and self.state.short.get(name):
            body = body[: self.state.short[name].pop(0)]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.state.cut_after.get(name):
            self.wfile.write(body[: self.state.cut_after[name].pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        with suppress(ConnectionError):  # of a client that was killed while it waited
            if self.state.stall_after.get(name):
                num_bytes = self.state.stall_after[name].pop(0)
                self.wfile.write(body[:num_bytes])
                self.state.stalled.set()
                self.state.go_on.wait(60)
                body = body[num_bytes:]
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


class _OtherHandler(_Handler):
    """Has the content of large files by their names, and asks nobody who they are."""

    def _answer(self) -> None:
        self.state.requests.append((self.command, self.path, self.headers.get("Range", "")))
        self.state.other_headers.append({key.lower(): value for key, value in self.headers.items()})
        _, etag, name = self.path.split("/", 2)
        for repository in self.state.repositories.values():
            if name in repository.files and repository.etag(name) == etag:
                return self._content(name, repository.files[name], {"ETag": '"of-this-host"'})
        self._refuse(404, "", "no such file")
