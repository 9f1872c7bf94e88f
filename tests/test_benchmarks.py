"""The benchmarks whose limits are promises run, and keep them."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import ROOT


def _script(name: str) -> ModuleType:
    spec = spec_from_file_location(Path(name).name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


sys.path.append(str(ROOT / "benchmarks"))  # where a script started as a program finds what it shares with others
compare, gpu = _script("compare"), _script("gpu")
rounds, turns = sys.modules["peers.rounds"], sys.modules["peers.turns"]


@pytest.mark.slow
def test_recurrences_keep_their_limits() -> None:
    """A share of the layer's time and a peak of memory, for both recurrent families at their published widths.

    One thread: with more, other work on the cores makes the many short calls of a recurrence wait for each other.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "scan.py"), "--threads", "1", "--repetitions", "3"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.count("-> kept") == 6, ran.stdout
    assert "BROKEN" not in ran.stdout, ran.stdout


def test_the_comparison_tells_apart_what_the_machine_was_like(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs that take as long as they say, on memory that is twice as fast in every other turn; the first stolen."""
    child = "import sys; print('{}', flush=True); [print(sys.argv[1], flush=True) for line in sys.stdin]"
    ours = {"seconds": 0.1, "bytes": 5e8, "peak_memory": 2e9}
    answers = {"lmx_turns.py": ours, "llama_cpp_turns.py": {"seconds": 0.16}, "transformers_turns.py": {"seconds": 0.8}}

    class Program(turns.Program):  # type: ignore[name-defined, misc]
        def __init__(self, command: list[str]) -> None:
            super().__init__([sys.executable, "-c", child, json.dumps(answers[Path(command[1]).name])])

    bandwidths = iter([3e10, 3e10, 6e10, 6e10] * 10)
    monkeypatch.setattr(compare, "Program", Program)
    monkeypatch.setattr(turns, "bandwidth_beside", lambda device: next(bandwidths))
    shares = iter([0.5] + [0.02] * 20)
    monkeypatch.setattr(turns, "Stolen", lambda: SimpleNamespace(share=lambda: next(shares)))
    monkeypatch.setattr(rounds, "random_gguf", lambda *_: Path("toy.gguf"))
    tests = (
        compare.Test("tg", compare.LLAMA_CPP, turns=6),
        compare.Test("tg", compare.TRANSFORMERS, turns=2),
        compare.Test("tg", compare.SHALLOW, compare.DEEP, turns=2),
        compare.Test("tg", turns=2),
    )
    toy = compare.Model("allenai/OLMoE-1B-7B-0924", "nf4", "nf4", tests)
    monkeypatch.setattr(compare, "MODELS", {"toy": toy})
    monkeypatch.setattr(sys, "argv", ["compare.py", "--threads", "1"])
    compare.main()
    said = capsys.readouterr()
    assert said.out.splitlines()[2:] == [
        "| toy | tg | llama.cpp Q4_0 | 1 | 50% | 30.0 | 40.00 | 25.00 | 1.60 | 67% |",
        "| toy | tg | llama.cpp Q4_0 | 2 | 2% | 30.0 | 40.00 | 25.00 | 1.60 | 67% |",
        "| toy | tg | llama.cpp Q4_0 | 3 | 2% | 60.0 | 40.00 | 25.00 | 1.60 | 33% |",
        "| toy | tg | transformers + bitsandbytes NF4 | 1 | 2% | 30.0 | 40.00 | 5.00 | 8.00 | 67% |",
        "| toy | tg | transformers + bitsandbytes NF4 | 1 | 2% | 60.0 | 40.00 | 5.00 | 8.00 | 33% |",
        "| toy | tg@3968 | lmx, depth 0 | 1 | 2% | 30.0 | 40.00 | 40.00 | 1.00 | 67% |",
        "| toy | tg@3968 | lmx, depth 0 | 1 | 2% | 60.0 | 40.00 | 40.00 | 1.00 | 33% |",
        "| toy | tg |  | 1 | 2% | 30.0 | 40.00 |  |  | 67% |",
        "| toy | tg |  | 1 | 2% | 60.0 | 40.00 |  |  | 33% |",
    ]
    assert "toy: lmx's peak of memory was 2.00 GB" in said.err


@pytest.mark.parametrize(
    ("without", "left"),
    [
        ([], [("tg", compare.LLAMA_CPP), ("tg", compare.TRANSFORMERS), ("pp512", compare.LLAMA_CPP)]),
        (["transformers"], [("tg", compare.LLAMA_CPP), ("tg", None), ("pp512", compare.LLAMA_CPP)]),
        (["llama.cpp", "transformers"], [("tg", None), ("pp512", None)]),
    ],
)
def test_what_a_peer_is_left_out_of_runs_alone(without: list[str], left: list[tuple[str, str | None]]) -> None:
    options = compare.argparse.Namespace(without=without, shallow=True)
    assert [(test.name, test.peer) for test in compare._chosen(compare.MODELS["olmoe"], options)] == left


def test_a_program_that_cannot_start_ends_the_comparison() -> None:
    with pytest.raises(SystemExit, match=r"ended before its time: .*\nno such model, it said"):
        turns.Program([sys.executable, "-c", "raise SystemExit('no such model, it said')"])


@pytest.mark.slow
def test_lmx_takes_turns() -> None:
    """The program itself, both tests, on one layer of a small model."""
    config = {**compare.preset("allenai/OLMoE-1B-7B-0924"), "num_hidden_layers": 1, "num_experts": 8}
    command = [sys.executable, "-c", _LMX_TURNS.format(path=str(ROOT / "benchmarks" / "peers"), config=config)]
    with turns.Program(command) as program:
        generated, read = program.run("tg 2"), program.run("pp 16")
    assert generated["bytes"] > 1e6
    assert read["bytes"] == 0
    assert min(generated["seconds"], read["seconds"], read["peak_memory"]) > 0


_LMX_TURNS = """
import sys
sys.path.insert(0, {path!r})
import lmx_turns
make = lmx_turns.build_dummy
lmx_turns.build_dummy = lambda hub, scheme, head_scheme: make({config!r}, scheme, head_scheme=head_scheme)
lmx_turns.main("toy", "nf4", "nf4", 2, 1)
"""


def test_the_gpu_comparison_tells_its_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ratios, the card's memory, and a prompt beside its products, from programs that answer with made-up figures."""
    asked: list[list[str]] = []

    def answer(command: list[str], *more: str) -> dict[str, object]:
        asked.append(command)
        if "transformers_runner.py" in command[1]:
            return {"tg16": 50.0}
        if "products_runner.py" in command[1]:
            return {"seconds": 0.1}
        is_prompt = command[command.index("-n") + 1] == "0"
        shares = {"flops_utilization": 0.6, "bandwidth_utilization": None if is_prompt else 0.45}
        sizes = {"bytes_per_token": None if is_prompt else 4.3e9, "peak_memory_bytes": 9, "peak_gpu_memory_bytes": 5e9}
        return {"tokens_per_second_mean": 8192.0 if is_prompt else 420.0, **shares, **sizes}

    monkeypatch.setattr(rounds, "run", answer)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda number: "a card")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cases", "falcon_mamba", "--rounds", "2"])
    assert gpu.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("a card, torch ")
    assert "| tg128 | lmx | 420.00 | | 45% |" in said
    assert "| tg128 | transformers + bitsandbytes NF4 | 50.00 | 8.40 | |" in said
    assert "| pp2048 | lmx | 8192.00 | | 60% |" in said
    assert "Bytes a token: tg128 4300 MB. Peak memory of lmx: 5.00 GB." in said
    assert "A prompt of 2,048 tokens takes 2.50 times its matrix products' 100.0 ms." in said
    assert all("--dummy" in command and "cuda" in command for command in asked if "bench" in command)
    assert len(asked) == 2 * 4


def test_one_program_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers is left out of a table, and lmx's own failure costs one model."""

    def answer(command: list[str], *more: str) -> dict[str, object]:
        if "transformers_runner.py" in command[1] or "mistralai/Mixtral-8x7B-v0.1" in command:
            raise SystemExit("no such kernel")
        shares = {"flops_utilization": None, "bandwidth_utilization": 0.45}
        sizes = {"bytes_per_token": 4.3e9, "peak_memory_bytes": 9, "peak_gpu_memory_bytes": 5e9}
        return {"tokens_per_second_mean": 420.0, **shares, **sizes}

    monkeypatch.setattr(rounds, "run", answer)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda number: "a card")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cases", "mixtral", "olmoe", "--rounds", "2"])
    assert gpu.main() == 1
    said = capsys.readouterr()
    assert "| tg128 | lmx | 420.00 | | 45% |" in said.out
    assert "transformers + bitsandbytes NF4 failed here" in said.out
    assert "gpu.py: error: mixtral: no such kernel" in said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_the_gpu_comparison_says_that_there_is_no_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.partition(":")[0] for line in said.err.splitlines()] == ["gpu.py"] * 2
    assert "no CUDA device" in said.err


def test_products_alone_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every matrix of the layers, and the head for the last token."""
    runner = _script("peers/products_runner")
    case = gpu.CASES["falcon_mamba"]
    (tmp_path / "config.json").write_text(json.dumps({**gpu.preset(case.hub), **case.tiny}))
    runner.main(str(tmp_path / "config.json"), 8, "cpu")
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    model = runner.build_dummy({**gpu.preset(case.hub), **case.tiny}, "nf4")
    work = runner._products(model, 8)
    assert [tuple(x.shape[:2]) for _, x in work] == [(1, 8)] * 4 * 2 + [(1, 1)]
    assert all(layer(x).shape[-1] == layer.out_features for layer, x in work)


@pytest.mark.slow
def test_the_gpu_comparison_runs_on_the_cpu() -> None:
    """All of its programs, in tiny."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--rounds", "1", "--threads", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.count("| lmx |") == 4
    assert ran.stdout.count("| transformers + bitsandbytes NF4 |") == 2
    assert "times its matrix products'" in ran.stdout
