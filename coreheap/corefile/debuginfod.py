"""Files by build-id from debuginfod servers, kept in a cache directory.

Knows: the protocol (GET URL/buildid/HEX/debuginfo), the settings of elfutils' client, and how little a server is to be
believed: what it sends counts only when its own build-id is the one that was asked for. Does not know: cores.

Nothing here runs unless someone asks for it (--debuginfod, or the API) and DEBUGINFOD_URLS names servers. What leaves
this machine is the build-id, nothing else of the core.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, Final

from coreheap.corefile.symbols import ElfFile

DEFAULT_TIME_LIMIT_SECONDS: Final = 90.0
DEFAULT_BYTE_LIMIT: Final = 2 << 30
IDLE_LIMIT_SECONDS: Final = 20.0
"""A server that sends nothing for so long is given up, whatever the time limit."""
SERVER_LIMIT: Final = 16
CHUNK_BYTES: Final = 1 << 18
KINDS: Final = ("debuginfo", "executable")
_SCHEMES: Final = ("http", "https")
_BUILD_ID_BYTES: Final = range(4, 65)


@dataclass(frozen=True, slots=True)
class Download:
    """The outcome of one request: ``path`` of the verified file, None with the ``problem`` in one sentence.

    ``problem`` is also set where a file came from one server after others had failed.
    """

    path: Path | None
    problem: str = ""
    from_cache: bool = False
    server: str = ""
    """Who sent it, as reports may name it; "" for a file that an earlier request left in the cache."""


@dataclass(frozen=True, slots=True)
class DebuginfodClient:
    """Asks servers in turn and keeps what they send. Safe to use from several processes at once."""

    urls: tuple[str, ...]
    cache_directory: Path
    time_limit_seconds: float = DEFAULT_TIME_LIMIT_SECONDS
    """For one file, all servers together."""
    byte_limit: int = DEFAULT_BYTE_LIMIT

    def fetch(self, build_id: bytes, kind: str = "debuginfo") -> Download:
        """The file of one of KINDS with this build-id, from the cache or a server. Raises nothing of its own making."""
        if kind not in KINDS or len(build_id) not in _BUILD_ID_BYTES:
            return Download(None, f"{build_id.hex() or 'an empty build-id'} cannot be asked for")
        path = self.cache_directory / build_id.hex() / kind
        if _has_build_id(path, build_id):
            return Download(path, from_cache=True)
        deadline = time.monotonic() + self.time_limit_seconds
        problems: list[str] = []
        for url in self.urls[:SERVER_LIMIT]:
            problem = self._fetch_from(url, build_id, kind, path, deadline)
            if not problem:
                return Download(path, "; ".join(problems), server=_without_secrets(url))
            problems.append(problem)
        return Download(None, "; ".join(problems) or "DEBUGINFOD_URLS names no server")

    def _fetch_from(self, url: str, build_id: bytes, kind: str, path: Path, deadline: float) -> str:
        """ "" when the verified file is in its place, else the problem."""
        server = _without_secrets(url)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{kind}-", dir=path.parent)
        except OSError as error:
            return f"{path.parent} cannot be written: {error.strerror or error}"
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                request = f"{url.rstrip('/')}/buildid/{build_id.hex()}/{kind}"
                problem = self._receive(request, file, deadline)
            if problem:
                return f"{server}: {problem}"
            if not _has_build_id(temporary, build_id):
                return f"{server}: what it sent is no ELF file with build-id {build_id.hex()}; refused"
            temporary.replace(path)
        except OSError as error:
            return f"{path.parent} cannot be written: {error.strerror or error}"
        finally:
            # What went wrong before is told already; a file left over has a name that nobody asks for.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return ""

    def _receive(self, url: str, file: IO[bytes], deadline: float) -> str:
        if not url.lower().startswith(tuple(f"{scheme}://" for scheme in _SCHEMES)):
            return "not an http or https address"
        left = deadline - time.monotonic()
        if left <= 0:
            return f"no time left of {self.time_limit_seconds:g} s"
        opener = urllib.request.build_opener(_OnlyHttp)
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "coreheap"})
            with opener.open(request, timeout=min(left, IDLE_LIMIT_SECONDS)) as answer:
                return self._copy(answer, file, deadline)
        except urllib.error.HTTPError as error:
            error.close()
            return "it does not have the file" if error.code == 404 else f"answer {error.code}"
        except urllib.error.URLError as error:
            return f"not reached: {error.reason}"
        except TimeoutError:
            return "it stopped sending"
        except (HTTPException, ValueError) as error:
            return f"not a usable answer: {type(error).__name__}"
        except OSError as error:
            return f"the connection broke: {error.strerror or error}"

    def _copy(self, answer: Any, file: IO[bytes], deadline: float) -> str:
        """The body into the file, within the limits of time and size; read in parts: a slow server is noticed."""
        promised = answer.headers.get("Content-Length")
        expected = int(promised) if promised is not None and promised.isascii() and promised.isdigit() else None
        if expected is not None and expected > self.byte_limit:
            return f"the file has {expected} bytes, the limit is {self.byte_limit}"
        received = 0
        while part := answer.read1(CHUNK_BYTES):
            received += len(part)
            if received > self.byte_limit:
                return f"the file has more than {self.byte_limit} bytes, the limit"
            if time.monotonic() > deadline:
                return f"not finished in {self.time_limit_seconds:g} s"
            file.write(part)
        if expected is not None and received != expected:
            return f"only {received} of {expected} bytes came"
        return ""


class _OnlyHttp(urllib.request.HTTPRedirectHandler):
    """Follows a server elsewhere by http or https, never to ftp or a file."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in _SCHEMES:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def client_from(environment: Mapping[str, str]) -> DebuginfodClient | None:
    """A client by the variables of elfutils' own (debuginfod_find_debuginfo(3)); None where DEBUGINFOD_URLS is empty.

    DEBUGINFOD_URLS, DEBUGINFOD_CACHE_PATH (else coreheap's own folder in XDG_CACHE_HOME), DEBUGINFOD_TIMEOUT in
    seconds, DEBUGINFOD_MAXSIZE in bytes; a number that is none counts as not set.
    """
    urls = tuple(url for url in environment.get("DEBUGINFOD_URLS", "").split() if not url.startswith("ima:"))
    if not urls:
        return None
    cache = environment.get("DEBUGINFOD_CACHE_PATH")
    home = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME") or tempfile.gettempdir(), ".cache")
    return DebuginfodClient(
        urls=urls,
        cache_directory=Path(cache) if cache else Path(home) / "coreheap" / "debuginfod",
        time_limit_seconds=float(_number(environment, "DEBUGINFOD_TIMEOUT") or DEFAULT_TIME_LIMIT_SECONDS),
        byte_limit=_number(environment, "DEBUGINFOD_MAXSIZE") or DEFAULT_BYTE_LIMIT,
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


def _has_build_id(path: Path, build_id: bytes) -> bool:
    file = ElfFile.open(path)
    return file is not None and file.build_id == build_id


def _without_secrets(url: str) -> str:
    """The server as reports may name it: without user, password and query."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "a server with a malformed address"
    return f"{parts.scheme}://{host}{port}{parts.path}"
