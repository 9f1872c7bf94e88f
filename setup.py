"""Build the optional CPU kernels into the package; everything else stands in pyproject.toml."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_NATIVE = Path(__file__).parent / "core" / "native"


def _builder():
    spec = importlib.util.spec_from_file_location("lmx_native_build", _NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compile with the compiler that is there; without one the install goes on, and torch does the work."""

    def get_ext_filename(self, fullname: str) -> str:
        """A library that ctypes loads: no Python version in its name."""
        return str(Path(*fullname.split(".")[:-1]) / _builder().LIBRARY_NAME)

    def build_extension(self, ext: Extension) -> None:
        """Put the library where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        error = _builder().build_any(target)
        if error is not None:
            sys.stderr.write(f"lmx: installed without its CPU kernels, torch's own will serve.\n{error}\n")
            self.extensions = [other for other in self.extensions if other is not ext]


class KernelWheel(bdist_wheel):
    """The library is the platform's, but of no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "lmx.core.native.liblmx_native",
            sorted(f"core/native/src/{p.name}" for p in _NATIVE.glob("src/*.cpp")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelWheel},
)
