"""Every family on a card beside the CPU: logits, splits, states that move, models over both."""

from pathlib import Path

import pytest
import torch
from card import CARD, error, greedy, run
from families import CONFIGS, write_family

from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel
from lmx.core.placement import Budget
from lmx.quant.apply import load_quantized
from lmx.quant.spec import QuantSpec

pytestmark = [pytest.mark.cuda, pytest.mark.parametrize("family", CONFIGS)]
IDS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
CUTS = {"at once": (), "in parts": (7, 8, 9, 30), "token by token": tuple(range(1, 40))}
# Rounding to bfloat16, once a layer and product; int8 on a card rounds activations to 8 bits, too.
ALLOWED = {"float32": 1e-4, "bf16": 2e-2, "nf4": 2e-2, "nf4 double": 2e-2, "fp4": 2e-2, "int8": 5e-2}


def load(source: Checkpoint, form: str, budgets: list[Budget] | None = None) -> LanguageModel:
    """budgets: None is the CPU."""
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    if form in ("float32", "bf16"):
        return load_model(source, dtype=dtype, budgets=budgets or ())
    scheme, _, double = form.partition(" ")
    spec = QuantSpec(scheme, double_quant=bool(double))  # type: ignore[arg-type]
    return load_quantized(source, spec=spec, dtype=dtype, budgets=budgets or ())


def whole() -> list[Budget]:
    return [Budget(CARD, 1 << 30)]


@pytest.fixture
def source(family: str, tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_family(tmp_path / "m", family, torch.float32))


@pytest.mark.parametrize("form", ALLOWED)
def test_logits_are_those_of_the_cpu(family: str, form: str, source: Checkpoint) -> None:
    on_card = load(source, form, whole())
    assert {weight.device for weight in on_card.parameters()} == {CARD}
    expected = run(load(source, "float32" if form == "bf16" else form), IDS)
    for cuts in CUTS.values():
        assert error(run(on_card, IDS, cuts), expected) < ALLOWED[form]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_splits_and_padding_agree(family: str, implementation, source: Checkpoint) -> None:
    """In float32: the card's kernels for other shapes sum in another order, and no more."""
    model = load(source, "float32", whole())
    model.attention = implementation
    expected = run(model, IDS)
    for cuts in CUTS.values():
        assert (run(model, IDS, cuts) - expected).abs().max() <= 1e-4 * expected.abs().max()
    mask = torch.ones(2, 12, dtype=torch.int64, device=CARD)
    mask[1, :5] = 0
    padded, state = IDS[:, :12].clone(), model.make_state(2)
    padded[1, 5:] = IDS[1, :7]
    with torch.no_grad():
        model(padded.to(CARD), attention_mask=mask, state=state)
        after = model(IDS[:, 12:20].to(CARD), state=state).logits.cpu()
    alone = run(model, torch.cat((IDS[1:, :7], IDS[1:, 12:20]), 1))[:, 7:]
    assert (after[1:] - alone).abs().max() <= 1e-4 * alone.abs().max()


def test_a_state_moves_between_devices(family: str, source: Checkpoint, tmp_path: Path) -> None:
    """Written on one, read on the other, in both directions; and both go on alike."""
    models = {"cpu": load(source, "float32"), "cuda": load(source, "float32", whole())}
    expected = run(models["cpu"], IDS)[:, 20:]
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        state = models[here].make_state(2)
        run(models[here], IDS[:, :20], (), state)
        state.save(tmp_path / here)
        moved = models[there].load_state(tmp_path / here)
        where = {buffer.device.type for layer in moved.layers for buffer in layer.buffers}
        assert where == {there}
        answer = run(models[there], IDS[:, 20:], (1, 2), moved)
        assert (answer - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("form", ["float32", "nf4"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_split_model_gives_the_same_ids(family: str, form: str, part: float, source: Checkpoint) -> None:
    total = sum(share.nbytes for share in load(source, form, whole()).shares)
    split = load(source, form, [Budget(CARD, int(part * total))])
    assert split.decoder.placement is not None
    assert {device.type for device in split.decoder.placement.devices} == {"cpu", "cuda"}
    prompt = IDS[0, :9].tolist()
    if form == "float32":
        assert greedy(split, prompt, 24) == greedy(load(source, form), prompt, 24)
    assert error(run(split, IDS, (7, 8)), run(load(source, form), IDS)) < ALLOWED[form]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_share_the_layers(family: str, source: Checkpoint) -> None:
    total = sum(share.nbytes for share in load(source, "float32", whole()).shares)
    split = load(source, "float32", [Budget(torch.device("cuda", card), total * 4 // 5) for card in range(2)])
    assert {weight.device.index for weight in split.parameters()} == {0, 1}
    prompt = IDS[0, :9].tolist()
    assert greedy(split, prompt, 24) == greedy(load(source, "float32"), prompt, 24)
