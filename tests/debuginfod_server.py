"""A debuginfod server on 127.0.0.1 that answers as it is told."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server:
    """A server on 127.0.0.1; ``answer`` handles every request, ``paths`` are those that were asked for."""

    def __init__(self, answer: Answer) -> None:
        self.paths: list[str] = []
        self.answer = answer
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                outer.answer(self)

            def log_message(self, *arguments: object) -> None:
                """Nothing: the tests look at ``paths``."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def content(body: bytes, *, promised: int | None = None, status: int = 200) -> Answer:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) if promised is None else promised))
        request.end_headers()
        request.wfile.write(body)

    return answer


def files(known: Mapping[tuple[str, str], Path]) -> Answer:
    """Answers by (build-id in hex, kind); 404 for all else."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        _, place, build_id, kind = request.path.split("/")
        path = known.get((build_id, kind)) if place == "buildid" else None
        (content(b"", status=404) if path is None else content(path.read_bytes()))(request)

    return answer
