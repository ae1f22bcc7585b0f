"""A Hugging Face Hub of a few folders, on this machine: the endpoints that a download asks, and what was asked of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = "someone/gated"


class Hub:
    """Folders by their ids, each with one commit, which is `main`."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.asked = folders, Counter[str]()
        self._lock = Lock()
        self.url = ""

    def note(self, what: str) -> None:
        with self._lock:
            self.asked[what] += 1


@contextmanager
def serving(folders: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(folders)

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            asks_api = parts[:2] == ["api", "models"]
            repository, *rest = ["/".join(parts[2:4]), *parts[4:]] if asks_api else ["/".join(parts[:2]), *parts[2:]]
            hub.note(f"{self.command} {repository} {' '.join(rest)}")
            if repository == GATED:
                return self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
            if repository not in hub.folders:
                return self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
            if rest[1] not in ("main", COMMIT):
                return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            folder = hub.folders[repository]
            if asks_api:
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                tree = [_entry(path, folder) for path in files]
                info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": entry["path"]} for entry in tree]}
                return self._send(200, json.dumps(tree if rest[0] == "tree" else info).encode(), body)
            data = (folder / "/".join(rest[2:])).read_bytes()
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._send(200, data, body, {"ETag": etag, "X-Repo-Commit": COMMIT})

        def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _entry(path: Path, folder: Path) -> dict[str, object]:
    return {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "size": path.stat().st_size,
        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
    }
