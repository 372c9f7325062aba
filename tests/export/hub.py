"""A server that speaks as much of the Hugging Face Hub's protocol as an upload needs, and keeps what it is sent."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was sent."""

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests for new repositories."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """`datasets/me/mine` -> path -> content."""
    private: bool = True
    """What it says of every repository."""

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        kept = self.files.setdefault(repository, {})
        for line in lines:
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serve an empty Hub on this machine. Files are taken in line; a real one has large ones sent to a store."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._send(self._answer(self.rfile.read(int(self.headers["Content-Length"] or 0))))

        def _answer(self, body: bytes) -> dict[str, Any]:
            if self.path == "/api/repos/create":
                told = json.loads(body)
                hub.created.append(told)
                kind = "datasets/" if told.get("type") == "dataset" else ""
                return {"url": f"{hub.address}/{kind}{told['organization'] or 'me'}/{told['name']}"}
            if self.path == "/api/validate-yaml":
                return {"errors": [], "warnings": []}
            found = re.fullmatch(r"/api/(\w+/[\w-]+/[\w-]+)/(preupload|commit)/main", self.path)
            assert found, self.path
            if found[2] == "preupload":
                mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                return {"files": [{"path": file["path"]} | mode for file in json.loads(body)["files"]]}
            hub.commit(found[1], [json.loads(line) for line in body.splitlines()])
            return {"commitUrl": f"{hub.address}/{found[1]}/commit/1", "commitOid": "1"}

        def do_GET(self) -> None:
            self._send({"sha": "0", "id": "me/mine", "private": hub.private})

        def _send(self, content: dict[str, Any]) -> None:
            encoded = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_: object) -> None:
            """Nothing: tests print what matters."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
