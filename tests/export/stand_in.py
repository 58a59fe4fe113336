"""A hub on this machine: it takes a repository, what is to come, and one commit."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class Hub:
    """Serves on ``address``; ``files`` holds what was committed, ``seen`` every request.

    Args:
        refuse: by the last part of a path (``create``, ``commit``) the status that is answered there.
    """

    def __init__(self, refuse: dict[str, int] | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.tokens: set[str | None] = set()
        hub, refused = self, refuse or {}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                hub.seen.append(path)
                hub.tokens.add(self.headers.get("Authorization"))
                status = next((code for part, code in refused.items() if f"/{part}" in path), 200)
                answer = (
                    hub.answer(path, body)
                    if status == 200
                    else {"error": f"no, {self.headers['Authorization']}"}
                )
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/create"):
            return {"url": f"{self.address}/me/small", "id": "me/small", "name": "me/small"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return {
                "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            }
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.address}/me/small/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
        if path.endswith("/validate-yaml"):
            return {"errors": [], "warnings": []}
        return {"id": "me/small", "sha": "0" * 40, "siblings": []}
