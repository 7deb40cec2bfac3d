"""Real cores: builds the fixture programs, lets them die, keeps the core beside its truth.

Knows compilers, core_pattern, gdb and the list of cases. Knows nothing of the product, and of the
truth only that `truth.condense` makes it. `scripts/make_cores` is the command line of this module;
tests ask `core_for(case)`, which builds what is missing.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import lzma
import os
import platform
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.real_cores import truth

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "fixtures" / "programs"
FIXTURES = ROOT / "fixtures" / "cores"

# Raised when the way of making cores changes in a manner that sources and flags do not show.
RECIPE = 1
LOG_BYTES = 1 << 28  # sparse: room for 8 million events
TIMEOUT_SECONDS = 300
# Nothing of the maker's environment may get into a core.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C"}
RECORD_FILES = (
    "record.events",
    "record.notes",
    "record.malloc_info.xml",
    "record.maps",
    "record.smaps",
)
COMMON_FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fno-builtin")
WRAPPED = (
    "malloc",
    "free",
    "calloc",
    "realloc",
    "memalign",
    "aligned_alloc",
    "posix_memalign",
    "valloc",
    "pvalloc",
)


class CannotMake(Exception):
    """A case cannot be made on this machine; the message says why and what would help."""


class RunFailed(Exception):
    """A program did not die as its case says."""


# ----------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True)
class Target:
    """A machine and libc to build and run for.

    `runner` stands before the program on the command line: another libc's ld.so with its
    `--library-path`, or an emulator. `libc` is hashed into the cache key; None means the one `cc`
    links with. `debian_packages` are the remedy when `cc` is missing.
    """

    name: str
    machine: str
    cc: str = "gcc"
    runner: tuple[str, ...] = ()
    libc: Path | None = None
    debian_packages: tuple[str, ...] = ("gcc", "libc6-dev")


NATIVE = Target(name="native", machine=platform.machine())
MUSL = Target(name="musl", machine=platform.machine(), cc="musl-gcc", debian_packages=("musl-tools",))


@dataclass(frozen=True, slots=True)
class Linking:
    """How a program is linked: a name and the flags."""

    name: str
    flags: tuple[str, ...]


RECORDED = ("recorder", "record_files", "scenario")
UNRECORDED = ("no_recorder", "record_files", "scenario")

_WRAP = ("-DRECORDER_WRAP", *(f"-Wl,--wrap={name}" for name in WRAPPED))
PIE = Linking("pie", ("-fPIE", "-pie"))
NO_PIE = Linking("no-pie", ("-fno-pie", "-no-pie"))
STATIC = Linking("static", ("-fno-pie", "-no-pie", "-static", *_WRAP))
STATIC_PIE = Linking("static-pie", ("-fPIE", "-static-pie", *_WRAP))


@dataclass(frozen=True, slots=True)
class Case:
    """One core to make: a program, how it is linked, started, ended and dumped.

    `dies_of` is the signal the program ends with; with `made_by` "gcore" it parks itself and gdb
    dumps the living process. `coredump_filter` is what the kernel is told to dump (core(5)).
    `preload` names a library that must be installed (`packages` says how). `log_bytes` 0 turns the
    event log off. `support` is what the program is linked with: the recorder; "no_recorder", which
    leaves malloc alone; or nothing.
    """

    name: str
    program: str
    arguments: tuple[str, ...] = ()
    linking: Linking = PIE
    environment: Mapping[str, str] = field(default_factory=dict)
    dies_of: str = "SIGABRT"
    coredump_filter: int = 0x33  # the kernel's own default
    made_by: str = "kernel"
    preload: str | None = None
    packages: tuple[str, ...] = ()
    log_bytes: int = LOG_BYTES
    support: tuple[str, ...] = RECORDED
    slow: bool = False
    target: Target = NATIVE

    def variant(self, suffix: str, **changes: object) -> Case:
        """The same case dumped another way, named `case@suffix`."""
        return replace(self, name=f"{self.name}@{suffix}", **changes)  # type: ignore[arg-type]


def _all_cases() -> Iterator[Case]:
    yield from _thread_cases()
    yield from _arena_cases()
    yield from _damage_cases()
    yield from _other_allocator_cases()


def _thread_cases() -> Iterator[Case]:
    kept = Case("threads_kept", "threads", ("threads=12", "seed=11"))
    yield kept
    yield kept.variant("filter_all", coredump_filter=0x7F)
    yield kept.variant("filter_no_files", coredump_filter=0x21)
    yield kept.variant("filter_anonymous", coredump_filter=0x01)
    yield kept.variant("filter_nothing", coredump_filter=0x00)
    yield kept.variant("segv", arguments=("threads=12", "seed=12", "end=segv"), dies_of="SIGSEGV")
    # gdb writes the whole reserve of every arena, 64 MiB each: few threads.
    yield kept.variant("gcore", arguments=("threads=2", "seed=13"), made_by="gcore")
    yield Case("threads_gone", "threads", ("threads=3", "gone=60", "steps=3000", "seed=21"))
    yield Case(
        "one_arena",
        "threads",
        ("threads=10", "gone=10", "steps=6000", "seed=31"),
        environment={"MALLOC_ARENA_MAX": "1"},
    )
    mix = ("threads=5", "gone=6", "steps=5000", "seed=41")
    yield Case("static_exe", "threads", mix, linking=STATIC)
    yield Case("static_pie", "threads", mix, linking=STATIC_PIE)
    yield Case("non_pie", "threads", mix, linking=NO_PIE)
    small = ("threads=4", "steps=1500", "slots=60", "limit=2000", "stack=64", "seed=51")
    yield Case("threads_small", "threads", small)
    yield Case("plain_small", "plain", ("seed=61",))
    yield Case("fork_child", "fork_child", ("threads=6", "seed=71"))


def _arena_cases() -> Iterator[Case]:
    yield Case("many_sub_heaps", "sub_heaps", ("threads=2", "heaps=10", "seed=81"))
    yield Case("every_list", "every_list", ("threads=4", "seed=91"))
    yield Case("brk_blocked", "main_arena", ("how=blocked", "seed=101"))
    yield Case("foreign_sbrk", "main_arena", ("how=foreign", "seed=102"))
    yield Case("mmapped", "mmapped", ("threads=6", "seed=111"))
    yield Case("bloat", "bloat", ("threads=40", "peak=1500", "seed=121"))
    yield Case("bloat_small", "bloat", ("threads=40", "peak=200", "stack=64", "seed=122"))
    yield Case("retained", "bloat", ("main=65536", "seed=123"))
    yield Case("retained_small", "bloat", ("main=3000", "seed=124"))
    big = ("chunks=10000000", "threads=4", "seed=131")
    yield Case("big_heap", "big_heap", big, log_bytes=0, slow=True)


def _damage_cases() -> Iterator[Case]:
    for how, signal_name in (("top", "SIGABRT"), ("unsorted", "SIGSEGV"), ("next_size", "SIGABRT")):
        arguments = (f"how={how}", "threads=3", "seed=141")
        yield Case(f"crash_in_malloc_{how}", "crash_in_malloc", arguments, dies_of=signal_name)
    yield Case("abort_double_free", "double_free", ("seed=151",))


def _other_allocator_cases() -> Iterator[Case]:
    yield Case("no_glibc_heap", "no_heap", log_bytes=0, support=())
    mix = ("threads=5", "gone=6", "steps=5000", "seed=161")
    for name, library, package in (
        ("jemalloc", "libjemalloc.so.2", "libjemalloc2"),
        ("tcmalloc", "libtcmalloc_minimal.so.4", "libtcmalloc-minimal4"),
        ("mimalloc", "libmimalloc.so.2", "libmimalloc2.0"),
    ):
        yield Case(
            f"other_allocator_{name}",
            "threads",
            mix,
            preload=library,
            packages=(package,),
            log_bytes=0,
            support=UNRECORDED,
        )
    yield Case("other_allocator_musl", "threads", mix, target=MUSL, log_bytes=0, support=UNRECORDED)


CASES: Mapping[str, Case] = {case.name: case for case in _all_cases()}
# Committed as fixtures/cores/NAME.core.zst: small enough, and tests then need no compiler.
FIXTURE_CASES = (
    "abort_double_free",
    "bloat_small",
    "plain_small",
    "retained_small",
    "threads_small",
)


# ------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, slots=True)
class CorePaths:
    """Where a finished case lies: the core, its truth file, the program that died."""

    core: Path
    truth: Path
    executable: Path


def default_directory() -> Path:
    """Where cores are cached unless told otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "coreheap" / "cores"


def core_for(name: str, directory: Path | None = None) -> CorePaths:
    """The core of one case, made now if it is missing or out of date.

    Raises KeyError for an unknown case, CannotMake when this machine lacks what it takes (a test
    skips then), RunFailed when the program did not die as it should.
    """
    case = CASES[name]
    directory = (directory or default_directory()).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / f"{name}.lock"):
        executable = _build(case, directory)
        paths = CorePaths(directory / f"{name}.core", directory / f"{name}.truth.json.gz", executable)
        key = _case_key(case, executable)
        key_file = directory / f"{name}.key"
        made = key_file.exists() and key_file.read_text() == key
        if not (made and paths.core.exists() and paths.truth.exists()):
            key_file.unlink(missing_ok=True)
            _run(case, executable, paths.core, paths.truth)
            key_file.write_text(key)
        return paths


def truth_for(name: str, directory: Path | None = None) -> truth.Truth:
    """The truth of one case, made now if need be."""
    return truth.load_truth(core_for(name, directory).truth)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------- building


def _sources(case: Case) -> list[Path]:
    return [PROGRAMS / f"{name}.c" for name in (*case.support, case.program)]


def _flags(case: Case) -> list[str]:
    # Debug information must not name the checkout it was built in.
    return [
        *COMMON_FLAGS,
        *case.linking.flags,
        f"-ffile-prefix-map={PROGRAMS}=programs",
        "-pthread",
    ]


def recorded_flags(case: Case) -> list[str]:
    """The compiler's flags without this machine's paths."""
    return [flag for flag in _flags(case) if not flag.startswith("-ffile-prefix-map")]


def _build(case: Case, directory: Path) -> Path:
    cc = shutil.which(case.target.cc)
    if cc is None:
        packages = " ".join(case.target.debian_packages)
        raise CannotMake(f"no {case.target.cc}: apt-get install {packages}")
    digest = hashlib.sha256(f"{RECIPE} {recorded_flags(case)}".encode())
    for source in (*_sources(case), *sorted(PROGRAMS.glob("*.h"))):
        digest.update(source.read_bytes())
    version = subprocess.run([cc, "--version"], capture_output=True, check=True, text=True).stdout
    digest.update(version.encode() + _libc_of(case.target, cc))
    executable = directory / "bin" / digest.hexdigest()[:12] / case.program
    executable.parent.mkdir(parents=True, exist_ok=True)
    with _locked(executable.parent / "lock"):
        if not executable.exists():
            _compile(case, cc, executable)
    return executable


def _compile(case: Case, cc: str, executable: Path) -> None:
    unfinished = executable.with_name(f"{case.program}.part")
    command = [cc, *_flags(case), *map(str, _sources(case)), "-o", str(unfinished), "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        hint = f" (apt-get install {' '.join(case.target.debian_packages)})"
        missing = hint if "No such file" in result.stderr or "cannot find" in result.stderr else ""
        raise CannotMake(f"{' '.join(command)} failed{missing}:\n{result.stderr}")
    unfinished.rename(executable)


def _libc_of(target: Target, cc: str) -> bytes:
    libc = target.libc
    if libc is None:
        answer = subprocess.run([cc, "-print-file-name=libc.so.6"], capture_output=True, check=True, text=True)
        libc = Path(answer.stdout.strip())
    return hashlib.sha256(libc.read_bytes()).digest() if libc.exists() else b""


def _case_key(case: Case, executable: Path) -> str:
    parts = [
        RECIPE,
        executable.parent.name,
        case.arguments,
        sorted(case.environment.items()),
        case.dies_of,
        case.coredump_filter,
        case.made_by,
        case.preload,
        case.log_bytes,
        case.target.name,
        hashlib.sha256(Path(truth.__file__).read_bytes()).hexdigest(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- running


def _run(case: Case, executable: Path, core: Path, truth_file: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix=f"work-{case.name}-", dir=core.parent))
    try:
        for name in RECORD_FILES:
            (work / name).touch()
        os.truncate(work / "record.events", case.log_bytes)
        if case.made_by == "gcore":
            made = _park_and_gcore(case, executable, work)
        elif _kernel_writes_cores_here():
            made = _die_with_core(case, executable, work)
        else:
            made = _die_under_gdb(case, executable, work)
        facts = {
            "case": case.name,
            "target": case.target.name,
            "machine": case.target.machine,
            "made_by": "kernel" if made.name.startswith("core") else "gdb",
            "signal": None if case.made_by == "gcore" else case.dies_of,
            "coredump_filter": case.coredump_filter,
            "build_flags": recorded_flags(case),
            "command": [case.program, *case.arguments],
            "environment": dict(case.environment),
        }
        truth.condense(work, truth_file, facts)
        made.rename(core)  # a copy would fill the holes of the sparse file
    except truth.RecordError as error:
        raise RunFailed(f"{case.name}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _command(case: Case, executable: Path, end: str | None = None) -> list[str]:
    last = [f"end={end}"] if end else []
    return [*case.target.runner, str(executable), *case.arguments, *last]


def _environment(case: Case) -> dict[str, str]:
    environment = {**ENVIRONMENT, **case.environment}
    if case.preload is not None:
        environment["LD_PRELOAD"] = str(_preloaded(case))
    return environment


def _command_with_limits(case: Case, executable: Path, end: str | None = None) -> list[str]:
    """The command behind a shell that allows cores and sets what goes into them.

    A shell, because preexec_fn is not safe in a process with threads; `env -i`, because the shell
    would hand on variables of its own.
    """
    script = 'ulimit -c "$0" && echo "$1" > /proc/self/coredump_filter && shift && exec "$@"'
    limit = "unlimited" if _kernel_writes_cores_here() else "0"
    variables = [f"{name}={value}" for name, value in _environment(case).items()]
    return [
        "/bin/sh",
        "-c",
        script,
        limit,
        hex(case.coredump_filter),
        "/usr/bin/env",
        "-i",
        *variables,
        *_command(case, executable, end),
    ]


def _preloaded(case: Case) -> Path:
    assert case.preload is not None
    for folder in ("/usr/lib", f"/usr/lib/{case.target.machine}-linux-gnu", "/usr/lib64"):
        if (Path(folder) / case.preload).exists():
            return Path(folder) / case.preload
    raise CannotMake(f"{case.name}: no {case.preload}: apt-get install {' '.join(case.packages)}")


def _kernel_writes_cores_here() -> bool:
    """Whether a dying process leaves `core` in its working directory."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    return pattern.startswith("core") and hard == resource.RLIM_INFINITY


def _die_with_core(case: Case, executable: Path, work: Path) -> Path:
    with (work / "output").open("w+") as output:
        result = subprocess.run(
            _command_with_limits(case, executable),
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
            timeout=TIMEOUT_SECONDS,
        )
        output.seek(0)
        said = output.read()[-2000:]
    expected = signal.Signals[case.dies_of]
    if result.returncode != -expected:
        raise RunFailed(f"{case.name}: ended with {result.returncode}, expected {expected!r}: {said}")
    cores = sorted(work.glob("core*"))
    if len(cores) != 1:
        raise RunFailed(f"{case.name}: {len(cores)} cores in {work}, expected 1: {said}")
    return cores[0]


def _gdb() -> str:
    gdb = shutil.which("gdb")
    if gdb is None:
        raise CannotMake("no gdb: apt-get install gdb")
    return gdb


def _die_under_gdb(case: Case, executable: Path, work: Path) -> Path:
    """For machines whose core_pattern sends cores elsewhere."""
    made = work / "gdb.core"
    commands = [
        "set startup-with-shell off",
        "set disable-randomization off",
        "set follow-fork-mode child",
        "unset environment",
        *(f"set environment {name} {value}" for name, value in _environment(case).items()),
        "run",
        f"generate-core-file {made}",
        "kill",
    ]
    gdb_arguments = [argument for command in commands for argument in ("-ex", command)]
    result = subprocess.run(
        [_gdb(), "-nx", "-batch", *gdb_arguments, "--args", *_command(case, executable)],
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )
    if not made.exists():
        raise RunFailed(f"{case.name}: gdb made no core: {(result.stdout + result.stderr)[-1000:]}")
    return made


def _park_and_gcore(case: Case, executable: Path, work: Path) -> Path:
    made = work / "gdb.core"
    with subprocess.Popen(
        _command_with_limits(case, executable, end="pause"),
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            while (line := process.stdout.readline()) != b"parked\n":
                if not line:
                    raise RunFailed(f"{case.name}: ended before it parked")
            dump = ["-p", str(process.pid), "-ex", f"generate-core-file {made}"]
            result = subprocess.run(
                [_gdb(), "-nx", "-batch", *dump],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_SECONDS,
            )
            if not made.exists():
                raise CannotMake(f"{case.name}: gdb cannot attach here: {result.stderr[-500:]}")
        finally:
            process.kill()
    return made


# ------------------------------------------------------------------------- cores in other shapes


def truncated(core: Path, share: float, directory: Path) -> Path:
    """A copy of the first `share` (0 to 1) of the core's bytes, holes kept."""
    copy = directory / f"{core.name}.{round(share * 100)}percent"
    subprocess.run(["cp", "--sparse=always", str(core), str(copy)], check=True)
    os.truncate(copy, int(core.stat().st_size * share))
    return copy


def holes_filled(core: Path, directory: Path) -> Path:
    """A copy without holes, as a pipe or a careless copy leaves it."""
    copy = directory / f"{core.name}.filled"
    subprocess.run(["cp", "--sparse=never", str(core), str(copy)], check=True)
    return copy


def compressed(core: Path, suffix: str, directory: Path) -> Path:
    """A compressed copy; `suffix` is zst, lz4, xz or gz. Raises CannotMake without the tool."""
    copy = directory / f"{core.name}.{suffix}"
    if suffix == "gz":
        with core.open("rb") as source, gzip.open(copy, "wb", compresslevel=1) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    elif suffix == "xz":
        with core.open("rb") as source, lzma.open(copy, "wb", preset=0) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    elif suffix in ("zst", "lz4"):
        tool = _tool({"zst": "zstd", "lz4": "lz4"}[suffix])
        with core.open("rb") as source, copy.open("wb") as sink:
            subprocess.run([tool, "-q", "-c"], stdin=source, stdout=sink, check=True)
    else:
        raise ValueError(f"no compression is called {suffix!r}: zst, lz4, xz or gz")
    return copy


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise CannotMake(f"no {name}: apt-get install {name}")
    return path


# ------------------------------------------------------------------------------ committed fixtures


@dataclass(frozen=True, slots=True)
class FixturePaths:
    """A committed core, still compressed, and its truth."""

    compressed_core: Path
    truth: Path


def fixture_names() -> list[str]:
    """The committed fixtures."""
    return sorted(path.name.removesuffix(".core.zst") for path in FIXTURES.glob("*.core.zst"))


def fixture(name: str) -> FixturePaths:
    """A committed fixture; needs no compiler."""
    return FixturePaths(FIXTURES / f"{name}.core.zst", FIXTURES / f"{name}.truth.json")


def unpacked_fixture(name: str, directory: Path) -> Path:
    """The committed core, unpacked into `directory`, with holes."""
    core = directory / f"{name}.core"
    if not core.exists():
        packed = fixture(name).compressed_core
        subprocess.run([_tool("zstd"), "-q", "-d", "--sparse", str(packed), "-o", str(core)], check=True)
    return core
