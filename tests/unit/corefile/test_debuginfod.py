"""Downloads from a debuginfod server: one on 127.0.0.1 that answers as it is told."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coreheap.corefile.debuginfod import DebuginfodClient, client_from
from tests.core_builder import elf_image
from tests.debuginfod_server import Answer, Server, content

BUILD_ID = bytes(range(1, 21))
OTHER_ID = bytes(range(2, 22))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # A proxy of the environment must not be asked for 127.0.0.1.
    monkeypatch.setenv("no_proxy", "*")
    running = Server(content(elf_image(build_id=BUILD_ID)))
    yield running
    running.close()


@pytest.fixture
def client(server: Server, tmp_path: Path) -> DebuginfodClient:
    return DebuginfodClient((server.url,), tmp_path / "cache", time_limit_seconds=20.0, byte_limit=1 << 20)


def leftovers(client: DebuginfodClient) -> list[str]:
    return sorted(path.name for path in client.cache_directory.rglob("*") if path.is_file())


class TestFetch:
    @pytest.mark.parametrize("kind", ["debuginfo", "executable"])
    def test_a_file_is_asked_for_once_and_kept(self, server: Server, client: DebuginfodClient, kind: str) -> None:
        first = client.fetch(BUILD_ID, kind)
        assert (first.problem, first.from_cache) == ("", False)
        assert first.path == client.cache_directory / BUILD_ID.hex() / kind
        assert first.path.read_bytes() == elf_image(build_id=BUILD_ID)
        again = client.fetch(BUILD_ID, kind)
        assert (again.path, again.from_cache) == (first.path, True)
        assert server.paths == [f"/buildid/{BUILD_ID.hex()}/{kind}"]
        assert leftovers(client) == [kind]

    def test_a_damaged_file_in_the_cache_is_fetched_again(self, server: Server, client: DebuginfodClient) -> None:
        path = client.fetch(BUILD_ID).path
        assert path is not None
        path.write_bytes(b"cut")
        assert client.fetch(BUILD_ID).path == path
        assert len(server.paths) == 2

    def test_the_next_server_is_asked(self, server: Server, client: DebuginfodClient, tmp_path: Path) -> None:
        nobody = Server(content(b""))
        nobody.close()
        found = DebuginfodClient((nobody.url, server.url), tmp_path / "other").fetch(BUILD_ID)
        assert found.path is not None
        assert found.problem.startswith(f"{nobody.url}: not reached")

    def test_an_answer_without_a_length(self, server: Server, client: DebuginfodClient) -> None:
        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.end_headers()
            request.wfile.write(elf_image(build_id=BUILD_ID))

        server.answer = answer
        assert client.fetch(BUILD_ID).path is not None


class TestRefusal:
    @pytest.mark.parametrize("body", [elf_image(build_id=OTHER_ID), elf_image(build_id=None), b"<html>", b""])
    def test_what_is_not_the_file_is_refused(self, server: Server, client: DebuginfodClient, body: bytes) -> None:
        server.answer = content(body)
        found = client.fetch(BUILD_ID)
        assert found.path is None
        assert "refused" in found.problem
        assert leftovers(client) == []

    @pytest.mark.parametrize(
        ("answer", "problem"),
        [
            (content(b"", status=404), "it does not have the file"),
            (content(b"", status=500), "answer 500"),
            (content(b"x" * 100, promised=200), "only 100 of 200 bytes"),
            (content(b"", promised=2 << 20), "the limit is 1048576"),
        ],
    )
    def test_answers_that_are_none(
        self, server: Server, client: DebuginfodClient, answer: Answer, problem: str
    ) -> None:
        server.answer = answer
        found = client.fetch(BUILD_ID)
        assert found.path is None
        assert problem in found.problem or "IncompleteRead" in found.problem
        assert leftovers(client) == []

    def test_more_bytes_than_the_limit(self, server: Server, client: DebuginfodClient) -> None:
        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.end_headers()
            try:
                while True:
                    request.wfile.write(b"x" * 65536)
            except OSError:
                return

        server.answer = answer
        found = client.fetch(BUILD_ID)
        assert found.path is None
        assert "more than 1048576 bytes" in found.problem
        assert leftovers(client) == []

    def test_a_server_that_drips(self, server: Server, tmp_path: Path) -> None:
        stop = threading.Event()

        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.end_headers()
            try:
                while not stop.wait(0.02):
                    request.wfile.write(b"x")
            except OSError:
                return

        server.answer = answer
        started = time.monotonic()
        found = DebuginfodClient((server.url,), tmp_path / "cache", time_limit_seconds=0.3).fetch(BUILD_ID)
        stop.set()
        assert found.path is None
        assert "not finished in 0.3 s" in found.problem
        assert time.monotonic() - started < 10

    def test_a_server_that_says_nothing(self, server: Server, tmp_path: Path) -> None:
        stop = threading.Event()

        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            stop.wait(10)

        server.answer = answer
        found = DebuginfodClient((server.url,), tmp_path / "cache", time_limit_seconds=0.3).fetch(BUILD_ID)
        stop.set()
        assert found.path is None
        assert found.problem

    @pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
    def test_redirects_to_anything_but_http(self, server: Server, client: DebuginfodClient, target: str) -> None:
        def answer(request: http.server.BaseHTTPRequestHandler) -> None:
            request.send_response(302)
            request.send_header("Location", target)
            request.send_header("Content-Length", "0")
            request.end_headers()

        server.answer = answer
        found = client.fetch(BUILD_ID)
        assert found.path is None
        assert "answer 302" in found.problem

    @pytest.mark.parametrize("url", ["file:///etc", "ftp://127.0.0.1", "/etc", "http://[", "http://127.0.0.1:x"])
    def test_addresses_that_are_no_http(self, tmp_path: Path, url: str) -> None:
        found = DebuginfodClient((url,), tmp_path / "cache").fetch(BUILD_ID)
        assert found.path is None
        assert found.problem

    @pytest.mark.parametrize("build_id", [b"", b"abc", bytes(65)])
    def test_build_ids_that_identify_nothing(self, server: Server, client: DebuginfodClient, build_id: bytes) -> None:
        assert client.fetch(build_id).path is None
        assert server.paths == []

    def test_a_kind_that_is_none(self, server: Server, client: DebuginfodClient) -> None:
        assert client.fetch(BUILD_ID, "../../passwd").path is None
        assert server.paths == []

    def test_a_cache_that_cannot_be_written(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        found = DebuginfodClient((server.url,), tmp_path / "file").fetch(BUILD_ID)
        assert found.path is None
        assert "cannot be written" in found.problem

    def test_reports_name_no_password(self, tmp_path: Path) -> None:
        found = DebuginfodClient(("http://user:secret@127.0.0.1:9/?token=secret",), tmp_path).fetch(BUILD_ID)
        assert "secret" not in found.problem


class TestEnvironment:
    def test_nothing_without_servers(self) -> None:
        assert client_from({}) is None
        assert client_from({"DEBUGINFOD_URLS": "  "}) is None

    def test_settings(self, tmp_path: Path) -> None:
        client = client_from(
            {
                "DEBUGINFOD_URLS": "http://one ima:enforcing http://two",
                "DEBUGINFOD_CACHE_PATH": str(tmp_path),
                "DEBUGINFOD_TIMEOUT": "7",
                "DEBUGINFOD_MAXSIZE": "1000",
            }
        )
        assert client == DebuginfodClient(("http://one", "http://two"), tmp_path, 7.0, 1000)

    def test_numbers_that_are_none_count_as_not_set(self) -> None:
        client = client_from({"DEBUGINFOD_URLS": "http://one", "DEBUGINFOD_TIMEOUT": "soon", "HOME": "/home/someone"})
        assert client is not None
        assert client.time_limit_seconds == 90.0
        assert client.cache_directory == Path("/home/someone/.cache/coreheap/debuginfod")
