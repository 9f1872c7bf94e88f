"""The compiled library: how it is built, found, and left alone."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_cases import PATHS
from support import needs_kernels

from lmx.core.native import build, compiled
from lmx.core.native.compiled import forced_path, kernel_path


def run(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.build_any(tmp_path / "out.so") == "no C++ compiler was found"
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(build, "compilers", lambda: [str(broken)])
    assert "no such thing" in build.build_any(tmp_path / "out.so")
    assert list(tmp_path.iterdir()) == [broken]


def test_torch_can_be_asked_for():
    assert run("from lmx.core.native.compiled import kernel_path; print(kernel_path())", LMX_KERNELS="torch") == "torch"


@pytest.fixture
def one_source(tmp_path, monkeypatch):
    """The least that makes a library, so that a test need not compile it all."""
    (tmp_path / "src").mkdir()
    for name in ("cpu.cpp", "lmx_native.h", "threads.h"):
        shutil.copy(Path(build.__file__).parent / "src" / name, tmp_path / "src")
    monkeypatch.setattr(build, "_HERE", tmp_path)
    return tmp_path


@pytest.mark.skipif(not build.compilers(), reason="no C++ compiler")
def test_a_build_can_be_loaded(one_source):
    target = one_source / build.LIBRARY_NAME
    assert build.build_any(target) is None
    assert ctypes.CDLL(str(target)).lmx_abi() == compiled._ABI
    assert sorted(path.name for path in one_source.iterdir()) == [build.LIBRARY_NAME, "src"]


@pytest.mark.skipif(not build.compilers(), reason="no C++ compiler")
def test_a_compiler_without_openmp_will_do(one_source, monkeypatch):
    words = f'for word in "$@"; do [ "$word" = -fopenmp ] && exit 1; done; exec {build.compilers()[0]} "$@"'
    simple = one_source / "simple"
    simple.write_text(f"#!/bin/sh\n{words}\n")
    simple.chmod(0o755)
    monkeypatch.setattr(build, "compilers", lambda: [str(simple)])
    assert build.build_any(one_source / build.LIBRARY_NAME) is None
    found = ctypes.CDLL(str(one_source / build.LIBRARY_NAME))
    found.lmx_set_threads(3)
    assert found.lmx_max_threads() == 3  # it counts by itself


@needs_kernels
def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "_ABI", compiled._ABI + 1)
    assert compiled.library.__wrapped__() is None


def test_without_the_library_torch_computes():
    code = """
import torch
from lmx.quant.four_bit import quantize_4bit
from lmx.quant.modules import QuantLinear
print(torch.equal(QuantLinear(quantize_4bit(torch.eye(64), "nf4"))(torch.ones(1, 64)), torch.ones(1, 64)))"""
    assert run(code, LMX_KERNELS="torch") == "True"


@pytest.mark.parametrize("content", [b"", b"no library"], ids=["empty", "text"])
def test_a_library_that_does_not_load_is_none(tmp_path, monkeypatch, content):
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    (tmp_path / build.LIBRARY_NAME).write_bytes(content)
    assert compiled.library.__wrapped__() is None


@needs_kernels
def test_the_best_path_is_taken_and_another_can_be():
    best = kernel_path()
    assert best in PATHS
    with forced_path("portable") as there:
        assert there
        assert kernel_path() == "portable"
    assert kernel_path() == best
    assert (
        run("from lmx.core.native.compiled import kernel_path; print(kernel_path())", LMX_KERNELS="portable")
        == "portable"
    )


@needs_kernels
def test_threads_are_torchs():
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert compiled.library().lmx_max_threads() == threads
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps, which Linux has")
def test_one_openmp_is_mapped():
    code = (
        "from lmx.core.native.compiled import library; library();"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rpartition('/')[2]}))"
    )
    assert run(code) == "1"
