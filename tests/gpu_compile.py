"""Compiling Triton kernels for a card that need not be there. For processes of their own, without the interpreter.

The calls are the real ones of the real functions, at published sizes; in place of launching, each kernel is compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from support import ROOT

_TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.bool: "*i1"}


def compile_in_a_child(script, cache):
    """Run a script of this folder that calls `print_compiled`; returns what each kernel needs."""
    command = [sys.executable, str(ROOT / "tests" / script), "80", "90"]
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def print_compiled(calls):
    """Compile calls, as `noted` takes them down, for the compute capabilities of the command line."""
    capabilities = [int(argument) for argument in sys.argv[1:]]
    print(json.dumps([_compile(*call, capability) for call in calls for capability in capabilities]))  # noqa: T201


@contextmanager
def noted(form, *modules):
    """In here nothing is launched; the calls of all kernels of these modules are kept in the list that this gives."""
    import triton

    calls = []
    kernels = [
        (module, name, kernel)
        for module in modules
        for name, kernel in list(vars(module).items())
        if isinstance(kernel, triton.JITFunction)
    ]
    for module, name, kernel in kernels:
        setattr(module, name, _Launch(form, f"{module.__name__}.{name}", kernel, calls))
    try:
        yield calls
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


class _Launch:
    """Stands in for a kernel: takes note of its calls."""

    def __init__(self, form, name, kernel, calls):
        self._form, self._name, self._kernel, self._calls = form, name, kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **options: self._calls.append((self._form, self._name, self._kernel, args, options))


def _compile(form, name, kernel, args, options, capability):
    """As a launch would; returns bytes of shared memory, of a thread's stack, and of machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {argument: options[argument] for argument in kernel.arg_names if argument in options}
    settings = {option: value for option, value in options.items() if option not in constants}
    signature, aligned = dict.fromkeys(constants, "constexpr"), {}
    for parameter, value in zip(kernel.params, args, strict=False):
        special = not parameter.do_not_specialize
        if value is None or (special and isinstance(value, int) and value == 1):
            constants[parameter.name] = value
        signature[parameter.name] = "constexpr" if parameter.name in constants else _type(value)
        if isinstance(value, torch.Tensor) or (special and isinstance(value, int) and value % 16 == 0):
            aligned[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)
    needs = {"shared": made.metadata.shared, "stack": _stack(made.asm["cubin"]), "bytes": len(made.asm["cubin"])}
    return {"name": name, "form": form, **needs}


def _type(value):
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def _stack(code):
    """What a thread spills to memory, as the tool of Triton's package reads it from the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", told.stdout + told.stderr)[1])
