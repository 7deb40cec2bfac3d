"""Real cores: builds the fixture programs, lets them die, keeps the core beside its truth.

Knows compilers, core_pattern, gdb and emulators; the cases are in cases.py, the machines and libcs in targets.py. Knows nothing of the product, and of the
truth only that `truth.condense` makes it. `scripts/make_cores` is the command line of this module;
tests ask `core_for(case)`, which builds what is missing.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.real_cores import truth
from tests.real_cores.cases import ALONE, CASES, MATRIX, Case
from tests.real_cores.damage_cases import DAMAGE
from tests.real_cores.targets import CannotMake as CannotMake
from tests.real_cores.targets import TargetFiles, build_files_of, files_of, locked

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "fixtures" / "programs"
FIXTURES = ROOT / "fixtures" / "cores"

# Raised when the way of making cores changes in a manner that sources and flags do not show.
RECIPE = 1
TIMEOUT_SECONDS = 300
HOST = os.uname().machine
# Nothing of the maker's environment may get into a core.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C"}
RECORD_FILES = (
    "record.events",
    "record.notes",
    "record.malloc_info.xml",
    "record.maps",
    "record.smaps",
)
COMMON_FLAGS = ("-O2", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fno-builtin")


class RunFailed(Exception):
    """A program did not die as its case says."""


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


def case_named(name: str) -> Case:
    """A case of any of the tables. Raises KeyError."""
    return CASES.get(name) or DAMAGE.get(name) or ALONE.get(name) or MATRIX[name]


def core_for(name: str, directory: Path | None = None) -> CorePaths:
    """The core of one case, made now if it is missing or out of date.

    Raises KeyError for an unknown case, CannotMake when this machine lacks what it takes (a test
    skips then), RunFailed when the program did not die as it should.
    """
    case = case_named(name)
    directory = (directory or default_directory()).resolve()
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    with locked(directory / f"{name}.lock"):
        executable = build(case, directory)
        paths = CorePaths(directory / f"{name}.core", directory / f"{name}.truth.json.gz", executable)
        key = _case_key(case, executable, directory)
        key_file = directory / f"{name}.key"
        made = key_file.exists() and key_file.read_text() == key
        if not (made and paths.core.exists() and paths.truth.exists()):
            key_file.unlink(missing_ok=True)
            _run(case, executable, directory, paths)
            key_file.write_text(key)
        return paths


def truth_for(name: str, directory: Path | None = None) -> truth.Truth:
    """The truth of one case, made now if need be."""
    return truth.load_truth(core_for(name, directory).truth)


# --------------------------------------------------------------------------------------- building


def _sources(case: Case) -> list[Path]:
    *support, program = (PROGRAMS / f"{name}.c" for name in (*case.support, case.program))
    return [*support, program if program.exists() else program.with_suffix(".cc")]


def _libraries(case: Case) -> list[Path]:
    return [PROGRAMS / f"{name}.c" for name in case.libraries]


def _headers(case: Case) -> list[Path]:
    """Those that all programs share, and those in the folder of this one's parts."""
    return [*sorted(PROGRAMS.glob("*.h")), *sorted((PROGRAMS / case.program).glob("*.h"))]


def recorded_flags(case: Case) -> list[str]:
    """The compiler's flags without this machine's paths."""
    return [*case.linking.standard, *COMMON_FLAGS, *case.linking.flags, "-pthread"]


def build(case: Case, directory: Path) -> Path:
    cc = shutil.which(case.target.cc)
    if cc is None:
        packages = " ".join(case.target.debian_packages)
        raise CannotMake(f"no {case.target.cc}: apt-get install {packages}")
    libc = _libc_to_build_with(case, directory)
    digest = hashlib.sha256(f"{RECIPE} {recorded_flags(case)}".encode())
    for source in (*_sources(case), *_libraries(case), *_headers(case)):
        digest.update(source.read_bytes())
    version = subprocess.run([cc, "--version"], capture_output=True, check=True, text=True).stdout
    digest.update(version.encode() + (_libc_of(cc) if libc is None else libc.version.encode()))
    executable = directory / "bin" / digest.hexdigest()[:12] / case.program
    executable.parent.mkdir(parents=True, exist_ok=True)
    with locked(executable.parent / "lock"):
        if not executable.exists():
            _compile(case, cc, libc, executable)
    return executable


def _libc_to_build_with(case: Case, directory: Path) -> TargetFiles | None:
    """None: what the compiler takes by itself."""
    # libstdc++ needs the libc that its compiler comes with.
    if case.target.platform is None or case.linking.libraries:
        return None
    if case.linking.is_static:
        return files_of(case.target, directory)
    return build_files_of(case.target, directory)


def _compile(case: Case, cc: str, libc: TargetFiles | None, executable: Path) -> None:
    unfinished = executable.with_name(f"{case.program}.part")
    chosen: tuple[str, ...] = ()
    if libc is not None and case.target.platform is not None:
        chosen = libc.compiler_flags(case.target.platform)
    # Debug information must not name the checkout it was built in.
    mapped = f"-ffile-prefix-map={PROGRAMS}=programs"
    for source in _libraries(case):
        library = executable.with_name(f"{source.stem}.so")
        flags = [*case.linking.standard, *COMMON_FLAGS, "-fPIC", "-shared", "-pthread"]
        _run_compiler(case, [cc, *flags, mapped, *chosen, str(source), "-o", str(library)])
    sources = map(str, _sources(case))
    libraries = (*case.linking.libraries, "-ldl")
    command = [cc, *recorded_flags(case), mapped, *chosen, *sources, "-o", str(unfinished), *libraries]
    _run_compiler(case, command)
    unfinished.rename(executable)


def _run_compiler(case: Case, command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        # gcc without g++ has neither a compiler of C++ nor its library.
        packages = (
            ("g++",) if any(word.endswith((".cc", "-lstdc++")) for word in command) else case.target.debian_packages
        )
        if any(words in result.stderr for words in ("No such file", "cannot find", "cannot execute")):
            raise CannotMake(f"{case.program} cannot be built: apt-get install {' '.join(packages)}")
        raise CannotMake(f"{' '.join(command)} failed:\n{result.stderr}")


def _libc_of(cc: str) -> bytes:
    answer = subprocess.run([cc, "-print-file-name=libc.so.6"], capture_output=True, check=True, text=True)
    libc = Path(answer.stdout.strip())
    return hashlib.sha256(libc.read_bytes()).digest() if libc.exists() else b""


def stripped(case: Case, executable: Path) -> Path:
    """A copy of an executable without symbols, made beside it."""
    platform = case.target.platform
    copy = executable.with_name(f"{executable.name}.stripped")
    with locked(executable.parent / "lock"):
        if not copy.exists():
            unfinished = executable.with_name(f"{executable.name}.stripped.part")
            tool = _tool(platform.strip if platform else "strip", "binutils")
            subprocess.run([tool, "-s", "-o", str(unfinished), str(executable)], check=True)
            unfinished.rename(copy)
    return copy


def _case_key(case: Case, executable: Path, directory: Path) -> str:
    parts: list[object] = [
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
        files_of(case.target, directory).version if case.target.release else "",
        hashlib.sha256(Path(truth.__file__).read_bytes()).hexdigest(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- running


def _run(case: Case, executable: Path, directory: Path, paths: CorePaths) -> None:
    for attempt in range(1, case.attempts + 1):
        try:
            _run_once(case, executable, directory, paths)
        except RunFailed:
            if attempt == case.attempts:
                raise
        else:
            return


def _run_once(case: Case, executable: Path, directory: Path, paths: CorePaths) -> None:
    work = Path(tempfile.mkdtemp(prefix=f"work-{case.name.replace('/', '-')}-", dir=directory))
    command = [*runner(case, directory), str(executable), *case.arguments]
    try:
        for name in RECORD_FILES:
            (work / name).touch()
        os.truncate(work / "record.events", case.log_bytes)
        if case.made_by == "gcore":
            made = _park_and_gcore(case, command, directory, work)
        elif case.target.is_emulated:
            made = _die_with_core(case, command, directory, work, "qemu_*.core")
        elif kernel_writes_cores_here():
            made = _die_with_core(case, command, directory, work, "core*")
        else:
            made = _die_under_gdb(case, command, directory, work)
        facts = {
            "case": case.name,
            "target": case.target.name,
            "machine": case.target.machine,
            "made_by": {"c": "kernel", "g": "gdb", "q": "qemu"}[made.name[0]],
            "signal": None if case.made_by == "gcore" else case.dies_of,
            "coredump_filter": case.coredump_filter,
            "build_flags": recorded_flags(case),
            "command": [case.program, *case.arguments],
            "environment": dict(case.environment),
        }
        truth.condense(work, paths.truth, facts)
        if case.target.is_emulated or case.made_by == "gcore":
            # These write every page. Holes read the same and take no space.
            subprocess.run([_tool("fallocate", "util-linux"), "--dig-holes", str(made)], check=True)
        made.rename(paths.core)  # a copy would fill the holes of the sparse file
    except truth.RecordError as error:
        raise RunFailed(f"{case.name}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def runner(case: Case, directory: Path) -> list[str]:
    """What stands before the program on the command line: an emulator, another libc's ld.so."""
    platform = case.target.platform
    runner: list[str] = []
    if platform is None:
        return runner
    if platform.emulator is None and HOST not in ("x86_64", "i686"):
        raise CannotMake(f"{case.name}: its program runs on x86-64 alone; this is {HOST}")
    if platform.emulator is not None:
        emulator = shutil.which(platform.emulator)
        if emulator is None:
            raise CannotMake(f"no {platform.emulator}: apt-get install {' '.join(platform.emulator_packages)}")
        runner.append(emulator)
    if not case.linking.is_static:
        files = files_of(case.target, directory)
        runner += [str(files.loader.resolve()), "--library-path", str(files.libraries)]
    return runner


def _environment(case: Case, directory: Path) -> dict[str, str]:
    environment = {**ENVIRONMENT, **case.environment}
    if case.preload is not None:
        environment["LD_PRELOAD"] = str(_preloaded(case, directory))
    return environment


def command_with_limits(case: Case, command: list[str], directory: Path) -> list[str]:
    """The command behind a shell that allows cores and sets what goes into them.

    A shell, because preexec_fn is not safe in a process with threads; `env -i`, because the shell
    would hand on variables of its own.
    """
    script = 'ulimit -c "$0" && echo "$1" > /proc/self/coredump_filter && shift && exec "$@"'
    limit = "unlimited" if kernel_writes_cores_here() or case.target.is_emulated else "0"
    variables = [f"{name}={value}" for name, value in _environment(case, directory).items()]
    return [
        "/bin/sh",
        "-c",
        script,
        limit,
        hex(case.coredump_filter),
        "/usr/bin/env",
        "-i",
        *variables,
        *command,
    ]


def _preloaded(case: Case, directory: Path) -> Path:
    assert case.preload is not None
    folders = ("/usr/lib", f"/usr/lib/{case.target.machine}-linux-gnu", "/usr/lib64")
    if case.target.release is not None:
        folders = (str(files_of(case.target, directory).libraries),)
    for folder in folders:
        if (Path(folder) / case.preload).exists():
            return Path(folder) / case.preload
    raise CannotMake(f"{case.name}: no {case.preload}: apt-get install {' '.join(case.packages)}")


def kernel_writes_cores_here() -> bool:
    """Whether a dying process leaves `core` in its working directory."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    return pattern.startswith("core") and hard == resource.RLIM_INFINITY


def _die_with_core(case: Case, command: list[str], directory: Path, work: Path, pattern: str) -> Path:
    with (work / "output").open("w+") as output:
        result = subprocess.run(
            command_with_limits(case, command, directory),
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
    cores = sorted(work.glob(pattern))
    if len(cores) != 1:
        raise RunFailed(f"{case.name}: {len(cores)} cores in {work}, expected 1: {said}")
    return cores[0]


def _gdb() -> str:
    gdb = shutil.which("gdb")
    if gdb is None:
        raise CannotMake("no gdb: apt-get install gdb")
    return gdb


def _die_under_gdb(case: Case, command: list[str], directory: Path, work: Path) -> Path:
    """For machines whose core_pattern sends cores elsewhere."""
    made = work / "gdb.core"
    commands = [
        "set startup-with-shell off",
        "set disable-randomization off",
        "set follow-fork-mode child",
        "unset environment",
        *(f"set environment {name} {value}" for name, value in _environment(case, directory).items()),
        "run",
        f"generate-core-file {made}",
        "kill",
    ]
    gdb_arguments = [argument for command in commands for argument in ("-ex", command)]
    result = subprocess.run(
        [_gdb(), "-nx", "-batch", *gdb_arguments, "--args", *command],
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


def _park_and_gcore(case: Case, command: list[str], directory: Path, work: Path) -> Path:
    made = work / "gdb.core"
    with subprocess.Popen(
        command_with_limits(case, [*command, "end=pause"], directory),
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


def _tool(name: str, package: str | None = None) -> str:
    path = shutil.which(name)
    if path is None:
        raise CannotMake(f"no {name}: apt-get install {package or name}")
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
