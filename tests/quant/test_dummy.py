from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import CONFIGS, FAMILIES, config_of, write_family
from pretend import CARD, CPU, PretendDevices

from lmx.core.checkpoint import Checkpoint
from lmx.core.heads import CausalHead
from lmx.core.loader import load_model
from lmx.core.native.compiled import library
from lmx.core.placement import Budget
from lmx.quant.apply import load_quantized
from lmx.quant.dummy import DummyModel
from lmx.quant.footprint import measure_footprint
from lmx.quant.four_bit import FourBit, dequantize_4bit
from lmx.quant.modules import QuantExpertBank, QuantHead, QuantLinear
from lmx.quant.spec import QuantSpec

SPECS = [None, QuantSpec("nf4"), QuantSpec("nf4", double_quant=True), QuantSpec("int8")]


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "nf4", "double", "int8"])
@pytest.mark.parametrize("head_scheme", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dummy_weighs_what_a_loaded_model_does(family: str, head_scheme, spec, tmp_path: Path) -> None:
    """The same modules on as many bytes, and answers that are finite and not all alike."""
    source = Checkpoint.open(write_family(tmp_path / family, family))
    loaded = (
        load_model(source)
        if spec is None and head_scheme is None
        else load_quantized(source, spec=spec, head_scheme=head_scheme)
    )
    dummy = DummyModel(config_of(family), spec=spec, head_scheme=head_scheme)
    model = dummy.build()
    assert measure_footprint(model) == measure_footprint(loaded)
    assert [type(part) for part in model.modules()] == [type(part) for part in loaded.modules()]
    assert dummy.nbytes >= measure_footprint(model).nbytes
    state = model.make_state()
    with torch.no_grad():
        for _ in range(3):
            logits = model(torch.randint(0, 96, (1, 20)), state=state).logits
            assert logits.isfinite().all()
            assert logits.float().std(dim=-1).min() > 0.01


def test_matrices_are_not_alike_and_of_sane_size() -> None:
    bank = DummyModel(config_of("olmoe"), spec=QuantSpec("nf4")).build().decoder.layers[0].mlp.experts
    first, second = (dequantize_4bit(matrix).float() for matrix in bank.gate[:2])
    assert not torch.equal(first, second)
    assert first.std() == pytest.approx(64**-0.5, rel=0.2)
    doubled = DummyModel(config_of("olmoe"), spec=QuantSpec("nf4", double_quant=True)).build()
    q = doubled.decoder.layers[0].mlp.experts.down[0]
    assert isinstance(q, FourBit)
    assert q.scales().min() > 0


def test_bytes_by_hand() -> None:
    """OLMoE as `families` has it: hidden 64, inner 64, 96 tokens, 2 layers, 2 of 4 experts, 4 heads of 16."""
    plain = measure_footprint(DummyModel(config_of("olmoe")).build())
    matrix, norms, router, rows = 64 * 64, 4 * 64, 4 * 64, 96 * 64
    layer = 4 * matrix + norms + router
    assert plain.parameters == 2 * (layer + 4 * 3 * matrix) + 64 + 2 * rows
    assert plain.nbytes == 2 * plain.parameters
    assert plain.step_bytes == 2 * (2 * (layer + 2 * 3 * matrix) + 64 + rows + 64)
    assert (plain.body_parameters, plain.head_parameters) == (2 * (layer + 2 * 3 * matrix) + 64, rows)
    # 4 bits an element and a scale for 64 of them, in bfloat16 where the kernels read that; norms, router and one
    # embedding stay in 16 bits, the head in int8
    nf4 = measure_footprint(DummyModel(config_of("olmoe"), spec=QuantSpec("nf4"), head_scheme="int8").build())
    packed = matrix // 2 + matrix // 64 * (4 if library() is None else 2)
    kept = 2 * (2 * (norms + router) + 64)
    assert nf4.nbytes == 2 * (4 + 4 * 3) * packed + kept + 2 * rows + (rows + 96 * 4)
    assert nf4.step_bytes == 2 * (4 + 2 * 3) * packed + kept + 2 * 64 + (rows + 96 * 4)
    assert nf4.parameters == plain.parameters
    # doubly: a byte for 64, and 4 bytes for 256 of these
    double = measure_footprint(DummyModel(config_of("olmoe"), spec=QuantSpec("nf4", double_quant=True)).build())
    packed = matrix // 2 + matrix // 64 + 4
    assert double.step_bytes == 2 * (4 + 2 * 3) * packed + kept + 2 * 64 + 2 * rows


def test_a_tied_embedding_counts_once_and_is_read_whole() -> None:
    tied = measure_footprint(DummyModel(config_of("recurrent_gemma")).build())
    body = sum(
        weight.numel()
        for name, weight in DummyModel(config_of("recurrent_gemma")).build().named_parameters()
        if "embed" not in name
    )
    assert tied.parameters == body + 96 * 64
    assert tied.step_bytes == tied.nbytes == 2 * tied.parameters
    copied = measure_footprint(DummyModel(config_of("recurrent_gemma"), head_scheme="int8").build())
    assert copied.parameters == tied.parameters
    assert copied.nbytes == tied.nbytes + 96 * 64 + 96 * 4
    assert copied.step_bytes == 2 * body + 2 * 64 + 96 * 64 + 96 * 4


@pytest.mark.parametrize(
    ("spec", "head_scheme", "words"),
    [
        (None, None, "bf16"),
        (None, "int8", "bf16, int8 head"),
        (QuantSpec("nf4"), "nf4", "nf4, nf4 head"),
        (QuantSpec("nf4", double_quant=True), None, "nf4 double"),
        (QuantSpec("int8"), None, "int8"),
    ],
)
def test_schemes_in_words(spec, head_scheme, words: str) -> None:
    model = DummyModel(config_of("olmoe"), spec=spec, head_scheme=head_scheme).build()
    assert measure_footprint(model).scheme == words


def test_other_dtypes() -> None:
    model = DummyModel(config_of("mixtral"), dtype=torch.float32).build()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert measure_footprint(model).scheme == "fp32"


def test_what_is_quantized_has_no_copy() -> None:
    model = DummyModel(
        config_of("mixtral"), spec=replace(QuantSpec("nf4"), skip=("*.q_proj",)), head_scheme="nf4"
    ).build()
    kinds = {type(part) for part in model.modules()}
    assert {QuantExpertBank, QuantHead, QuantLinear} <= kinds
    assert CausalHead not in kinds
    names = {name for name, weight in model.named_parameters() if weight.dim() == 2}
    layers = range(2)
    kept = {f"decoder.layers.{i}.{part}.weight" for i in layers for part in ("attention.q", "mlp.router")}
    assert names == {"decoder.embed.weight", *kept}


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_made_where_they_will_lie(family) -> None:
    """The same ones on a card, which is pretended; a plan splits them, and what stays is what the host must hold."""
    options = {"spec": QuantSpec("nf4", double_quant=True), "head_scheme": "int8"}
    here, there, split = (DummyModel(config_of(family), **options) for _ in range(3))
    plain = here.build().state_dict()
    with PretendDevices() as devices, torch.no_grad():
        places = there.places(budgets=[Budget(CARD, 1 << 40)])
        assert places.host_bytes(there.nbytes) == 0
        whole = there.build(places)
        assert {devices.where(weight) for weight in whole.parameters()} == {CARD}
        places = split.places(budgets=[Budget(CARD, whole.shares[0].nbytes // 2)])
        model = split.build(places)
        assert 0 < places.host_bytes(split.nbytes) < whole.shares[0].nbytes
        assert {devices.where(weight) for weight in model.parameters()} == {CARD, CPU}
        assert model(torch.zeros(1, 3, dtype=torch.int64, device=model.device)).logits.isfinite().all()
    drawn = ("A_log", "D", "dt_proj", "rg_lru")  # by each recurrence anew
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, plain[name]) or any(word in name for word in drawn), name
