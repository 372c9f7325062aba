"""An OpenAI-compatible endpoint whose answers are scripted, for what a real one does too seldom to wait for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[list[dict[str, str]]], "str | tuple[int, str]"]
"""Messages -> what the model says, or an HTTP status with an error message."""


@contextmanager
def serving(
    answer: Answer, model: str = "judge", cut_at: int | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve one model; yields the base URL and the list of request bodies (with `authorization`) so far.

    Answers end after `cut_at` characters, as others do at their limit of tokens.
    """
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body | {"authorization": self.headers["Authorization"], "path": self.path})
            said = answer(body["messages"]) if body["model"] == model else (404, f"no model {body['model']}")
            if isinstance(said, str):
                message = {"role": "assistant", "content": said[:cut_at]}
                reason = "stop" if said == said[:cut_at] else "length"
                self._send(200, {"choices": [{"index": 0, "message": message, "finish_reason": reason}]})
            else:
                self._send(said[0], {"error": {"message": said[1], "code": said[0]}})

        def _send(self, status: int, content: dict[str, Any]) -> None:
            encoded = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": model, **content})
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded.encode())))
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that has stopped asking
                self.end_headers()
                self.wfile.write(encoded.encode())

        def log_message(self, *_: object) -> None:
            """Nothing: tests print what matters."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
