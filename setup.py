"""The compiled kernels and the guard of mapped files; all else about the package is in setup.cfg.

The extensions are optional: where there is no C compiler, or no Cython, coreheap installs without them and runs the
reference kernels in Python, with a warning.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = {
    "coreheap.kernels._compiled": Path("coreheap") / "kernels" / "_compiled.pyx",
    "coreheap.corefile._bus_guard": Path("coreheap") / "corefile" / "_bus_guard.pyx",
}
SANITIZE = os.environ.get("COREHEAP_SANITIZE", "")
"""Words for -fsanitize, "address,undefined" in continuous integration; such a build needs libasan in LD_PRELOAD to run."""


def extensions() -> list[Extension]:
    """The extension modules that can be built here."""
    if not all(Path(__file__).parent.joinpath(source).exists() for source in SOURCES.values()):
        return []
    try:
        from Cython.Build import cythonize
    except ImportError:
        print("coreheap: Cython is missing, the kernels are not compiled", file=sys.stderr)
        return []
    compiler_options, linker_options = ["-O3"], []
    if SANITIZE:
        linker_options = [f"-fsanitize={SANITIZE}"]
        compiler_options = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", *linker_options]
    compiled = [
        Extension(name, [source.as_posix()], extra_compile_args=compiler_options, extra_link_args=linker_options)
        for name, source in SOURCES.items()
    ]
    modules: list[Extension] = cythonize(compiled, build_dir="build/cython", language_level=3)
    for module in modules:
        module.optional = True  # cythonize makes new extensions and forgets this
    return modules


setup(ext_modules=extensions())
