"""Compiling Triton kernels without a card: in a process of its own, since under the interpreter nothing compiles."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """One way to call a kernel: pointers by what they point to, constants; all else are integers divisible by 16."""

    module: str
    name: str
    pointers: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)
    warps: int = 4


def compile_kernels(kernels, capability, cache):
    """Compile for a compute capability, 80 or 90; returns each kernel's bytes of machine code and of its stack."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).resolve().parent.parent), env.get("PYTHONPATH", "")))
    env["TRITON_CACHE_DIR"] = str(cache)
    work = json.dumps({"capability": capability, "kernels": [asdict(kernel) for kernel in kernels]})
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=work, capture_output=True, text=True, timeout=300, env=env)
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    return json.loads(done.stdout)


def _compile(kernel, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    function = getattr(import_module(f"lmx.core.gpu.{kernel.module}"), kernel.name)
    names = function.arg_names
    signature = {name: kernel.pointers.get(name, "i32") for name in names}
    signature |= dict.fromkeys(kernel.constants, "constexpr")
    whole = [name for name in names if signature[name] not in ("constexpr", "fp32")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in whole}
    source = ASTSource(fn=function, signature=signature, constexprs=kernel.constants, attrs=aligned)
    made = compile_source(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernel.warps})
    return {"bytes": len(made.asm["cubin"]), "stack": _stack(made.asm["cubin"])}


def _stack(machine_code):
    """Bytes of local memory of a thread: registers that were spilled. Triton brings a cuobjdump that tells."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return int(re.search(r"STACK:(\d+)", told.stdout + told.stderr)[1])


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps([_compile(Kernel(**kernel), asked["capability"]) for kernel in asked["kernels"]]))  # noqa: T201
