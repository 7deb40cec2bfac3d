"""The compiled kernels; all else about the package is in setup.cfg.

The extension is optional: where there is no C compiler, or no Cython, coreheap installs without it and runs the
reference kernels in Python, with a warning.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("coreheap") / "kernels" / "_compiled.pyx"


def extensions() -> list[Extension]:
    """The extension modules that can be built here."""
    if not Path(__file__).parent.joinpath(KERNELS).exists():
        return []
    try:
        from Cython.Build import cythonize
    except ImportError:
        print("coreheap: Cython is missing, the kernels are not compiled", file=sys.stderr)
        return []
    compiled = Extension(
        "coreheap.kernels._compiled",
        sources=[KERNELS.as_posix()],
        extra_compile_args=["-O3"],
    )
    modules: list[Extension] = cythonize([compiled], build_dir="build/cython", language_level=3)
    for module in modules:
        module.optional = True  # cythonize makes new extensions and forgets this
    return modules


setup(ext_modules=extensions())
