"""Compile the kernels: `python -m lmx.core.native.build` puts the library beside the sources of a checkout.

The wheel's build (setup.py) loads this file by its path: it may import nothing but the standard library.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

LIBRARY_NAME = "liblmx_native.so"
_HERE = Path(__file__).parent
# -fno-math-errno lets the compiler vectorise sqrt; NaN and infinity keep their meaning. Nothing is fused that torch
# does not fuse, so that values come out bit for bit alike.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
)
# GCC 12 takes the undefined registers of its own headers for ours.
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")


def compilers() -> list[str]:
    """The C++ compilers to try, the user's own choice first."""
    return [name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name and shutil.which(name)]


def build(target: Path, compiler: str) -> None:
    """Compile every source into `target`, with OpenMP where the compiler has it.

    Raises subprocess.CalledProcessError with the compiler's words where neither works.
    """
    sources = sorted(str(path) for path in (_HERE / "src").glob("*.cpp"))
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    for openmp in (["-fopenmp"], []):
        command = [compiler, *_FLAGS, *_QUIET, *openmp, *sources, "-o", str(partial), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            partial.replace(target)
            return
    partial.unlink(missing_ok=True)
    raise subprocess.CalledProcessError(result.returncode, command, result.stdout, result.stderr)


def build_any(target: Path) -> str | None:
    """Compile with the first compiler that can; returns what went wrong if none could."""
    said = "no C++ compiler was found"
    for compiler in compilers():
        try:
            build(target, compiler)
        except (OSError, subprocess.CalledProcessError) as error:
            said = f"{compiler}: {getattr(error, 'stderr', None) or error}"
            continue
        return None
    return said


if __name__ == "__main__":
    sys.exit(build_any(_HERE / LIBRARY_NAME))
