"""A model hub on localhost over a folder `owner/name/`: enough of the protocol for huggingface_hub's real client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextmanager
def mirror(root: Path, commit: str) -> Iterator[str]:
    """Serve every repository below `root` at one commit; yields the endpoint's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                return self.listing(path.removeprefix("api/models/"), body)
            repo, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            file = root / repo / name
            if revision != commit or not file.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            content = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
            return self.send(200, content, headers, body)

        def listing(self, path: str, body: bool) -> None:
            repo, _, revision = path.partition("/tree/") if "/tree/" in path else path.partition("/revision/")
            folder = root / repo
            if not folder.is_dir() or revision not in ("", commit):
                code = "RevisionNotFound" if folder.is_dir() else "RepoNotFound"
                return self.send(404, b'{"error": "not found"}', {"X-Error-Code": code}, body)
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            names = [p.relative_to(folder).as_posix() for p in files]
            answer: object = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            if "/tree/" in path:
                answer = [
                    {
                        "type": "file",
                        "path": n,
                        "size": p.stat().st_size,
                        "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                    }
                    for n, p in zip(names, files, strict=True)
                ]
            return self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
