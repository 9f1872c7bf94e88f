"""What gets to a card, and what it takes of the host on the way."""

import json
from pathlib import Path

import pytest
import torch
from card import CARD
from families import CONFIGS, config_of, write_family
from support import run_lmx

from lmx.core.bench import Bench, Workload
from lmx.core.ceilings import measure_ceilings
from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel
from lmx.core.placement import Budget
from lmx.quant.apply import load_quantized, quantize_matrix
from lmx.quant.dummy import DummyModel
from lmx.quant.matmul import dequantize
from lmx.quant.memory import peak_memory_bytes, reset_peak_memory
from lmx.quant.spec import QuantSpec

pytestmark = pytest.mark.cuda
LARGE = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}


def load(source: Checkpoint, scheme: str | None) -> LanguageModel:
    if scheme is None:
        return load_model(source, device=CARD)
    return load_quantized(source, spec=QuantSpec(scheme), device=CARD)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (37, 129), (1, 5), (3, 4096)])
def test_a_matrix_is_quantized_to_the_same_bytes(scheme: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """As on the CPU, blocks of zeros and a last block that is not whole included."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[: shape[0] // 2, : min(64, shape[1] // 2)] = 0
    for double in (False, True) if scheme != "int8" else (False,):
        spec = QuantSpec(scheme, double_quant=double)  # type: ignore[arg-type]
        here, there = quantize_matrix(x, spec), quantize_matrix(x.to(CARD), spec)
        assert there.device == CARD
        names = ("weight", "absmax") if scheme == "int8" else ("packed",) if double else ("packed", "absmax")
        for name in names:
            assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name
        torch.testing.assert_close(dequantize(there).cpu(), dequantize(here), rtol=1e-2 if double else 0, atol=1e-6)


@pytest.mark.parametrize("scheme", [None, "nf4", "int8"])
def test_the_host_holds_no_second_copy(scheme: str | None, tmp_path: Path) -> None:
    """Of 400 MB, no more than a few matrices at once, and the pages of the file are let go."""
    source = Checkpoint.open(write_family(tmp_path / "m", "mixtral", torch.bfloat16, **LARGE))
    assert source.total_bytes > 400e6
    # CUDA itself, its libraries and Triton with its compiler take more of the host than is allowed below.
    first = Checkpoint.open(write_family(tmp_path / "first", "mixtral", torch.bfloat16))
    load(first, scheme)(torch.zeros(1, 3, dtype=torch.int64, device=CARD))
    if not reset_peak_memory():
        pytest.skip("this system cannot reset a process's peak memory")
    before = peak_memory_bytes()
    model = load(source, scheme)
    assert peak_memory_bytes() - before < 150e6
    assert {weight.device for weight in model.parameters()} == {CARD}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("double", [False, True])
def test_random_weights_are_made_on_the_card(family: str, double: bool) -> None:
    """The bytes of those that the CPU makes, and all of them there."""
    spec = QuantSpec("nf4", double_quant=double)
    here, there = (DummyModel(config_of(family), spec=spec, head_scheme="int8") for _ in range(2))
    model = there.build(there.places(CARD))
    assert {weight.device for weight in model.parameters()} == {CARD}
    drawn = ("A_log", "D", "dt_proj", "rg_lru")  # a recurrence draws its own on the device
    theirs, ours = here.build().state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in ours.items():
        if not any(word in name for word in drawn):
            assert torch.equal(weight.cpu(), theirs[name]), name
    with torch.no_grad():
        assert model(torch.zeros(1, 5, dtype=torch.int64, device=CARD)).logits.isfinite().all()


def test_the_card_has_ceilings() -> None:
    """Between a laptop's and what no card has yet."""
    found = measure_ceilings(CARD)
    assert 5e10 < found.bandwidth < 3e13
    assert 1e12 < found.flops < 1e16


def test_a_step_is_timed_to_its_end() -> None:
    """Many steps take as many times as long: none is left running behind the clock."""
    model = DummyModel(config_of("olmoe"), spec=QuantSpec("nf4"))
    bench = Bench(model.build(model.places(CARD)))
    few, many = (min(s.seconds for s in bench.run(Workload(0, count), 3)) for count in (16, 64))
    assert 2 < many / few < 8


def test_bench_tells_of_the_card(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "mixtral", **LARGE)
    ran = run_lmx("bench", str(folder), "--device", "cuda", "-p", "64", "-n", "8", "-r", "2", "-o", "json", timeout=300)
    assert ran.returncode == 0, ran.stderr
    for row in json.loads(ran.stdout):
        assert row["device"] == "cuda:0"
        assert row["gpu"] == torch.cuda.get_device_name(0)
        assert row["bytes"] < row["peak_gpu_memory_bytes"] < 2 * row["bytes"] + 500e6
        used = row["bandwidth_utilization"] if row["n_gen"] else row["flops_utilization"]
        assert 0 < used < 1.05


def test_chat_says_what_lies_where(tmp_path: Path) -> None:
    model = load_model(Checkpoint.open(write_family(tmp_path, "olmoe")), budgets=[Budget(CARD, 1 << 30)])
    (share,) = model.shares
    assert (share.device, share.layers, share.banks, share.embed, share.head) == ("cuda:0", 2, 2, True, True)
    ran = run_lmx(
        "generate", "-n", "3", "--device", "cuda", "--gpu-memory", "3MB", "--json", stdin="Hello", timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.split(": ")[1] for line in ran.stderr.splitlines() if " layers" in line] == ["cpu", "cuda:0"]
