"""The benchmarks whose limits are promises run, and keep them."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT


def _script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


compare = _script("compare")


@pytest.mark.slow
def test_recurrences_keep_their_limits() -> None:
    """A share of the layer's time and a peak of memory, for both recurrent families at their published widths.

    One thread: with more, other work on the cores makes the many short calls of a recurrence wait for each other.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "scan.py"), "--threads", "1", "--repetitions", "3"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.count("-> kept") == 6, ran.stdout
    assert "BROKEN" not in ran.stdout, ran.stdout


def test_the_comparison_tells_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds, ratios and shares, from programs that answer with made-up speeds."""
    speeds = {"lmx": [10.0, 30.0, 20.0], "llama.cpp Q4_0": [10.0, 10.0, 16.0]}
    rounds = {name: iter(values) for name, values in speeds.items()}

    def answer(command: list[str], *more: str) -> dict[str, float]:
        if more:
            return {"tg128": next(rounds["llama.cpp Q4_0"])}
        assert command[command.index("-d") + 1] == "0"
        shares = {"flops_utilization": None, "bandwidth_utilization": 0.5}
        sizes = {"bytes_per_token": 5e6, "peak_memory_bytes": 1e9}
        return {"tokens_per_second_mean": next(rounds["lmx"]), **shares, **sizes}

    monkeypatch.setattr(compare, "_run", answer)
    monkeypatch.setattr(compare, "MODELS", {"toy": compare.Model("org/toy", "nf4", ("tg128",), ("tg128",), ())})
    monkeypatch.setattr(compare, "_gguf", lambda *_: Path("toy.gguf"))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--models", "toy"])
    compare.main()
    said = capsys.readouterr().out
    assert "| tg128 | lmx | 20.00 | | 50% |" in said
    assert "| tg128 | llama.cpp Q4_0 | 10.00 | 1.25 | |" in said
    assert "tg128 5 MB. Peak memory of lmx: 1.00 GB." in said
