"""Where the parts of a model go: the plan, from bytes alone, and models whose layers lie apart.

The cards are pretended (`pretend.py`): models over them give the numbers of one on the CPU, and no operation meets two.
"""

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from families import CONFIGS, config_of, write_family
from pretend import CARD, CPU, OTHER_CARD, PretendDevices
from torch import Tensor

from lmx.core import placement
from lmx.core.checkpoint import Checkpoint
from lmx.core.layers.moe import ExpertBank
from lmx.core.loader import build, load_model
from lmx.core.model import LanguageModel
from lmx.core.placement import (
    HOST,
    Budget,
    LayerBytes,
    ModelBytes,
    Placement,
    measure_parts,
    plan_placement,
    state_bytes,
)
from lmx.quant.apply import load_quantized
from lmx.quant.spec import QuantSpec

ONE, TWO, THREE = (torch.device("cuda", number) for number in range(3))
MOE = ["mixtral", "olmoe", "dbrx"]


def dense(layers: int = 4, *, embed: int = 10, head: int = 20, tied: bool = False) -> ModelBytes:
    return ModelBytes(embed, (LayerBytes(90, state=10),) * layers, head, tied)


def experts(layers: int = 4) -> ModelBytes:
    return ModelBytes(10, (LayerBytes(8, 90, 2),) * layers, 20)


def held(placement: Placement, sizes: ModelBytes) -> dict[torch.device, int]:
    """The bytes on each device, counted part by part."""
    found = dict.fromkeys(placement.devices, 0)
    found[placement.embed] += sizes.embed
    found[placement.head] += sizes.head
    for layer, at, bank_at in zip(sizes.layers, placement.layers, placement.banks, strict=True):
        found[at] += layer.rest + layer.state
        found[bank_at] += layer.bank
    return found


def test_what_fits_one_card_lies_there_whole() -> None:
    sizes = dense()
    assert sizes.total == 430
    assert plan_placement(sizes, [Budget(ONE, 430)]) == Placement.whole(ONE, 4)
    assert plan_placement(sizes, [Budget(ONE, 429), Budget(TWO, 430)]) == Placement.whole(TWO, 4)


def test_first_layers_and_the_embedding_stay_on_the_host() -> None:
    plan = plan_placement(dense(), [Budget(ONE, 320)])
    assert plan == Placement(HOST, (HOST, ONE, ONE, ONE), (HOST, ONE, ONE, ONE), ONE)
    assert held(plan, dense()) == {HOST: 110, ONE: 320}
    assert plan_placement(dense(), [Budget(ONE, 319)]).layers == (HOST, HOST, ONE, ONE)


def test_a_tied_embedding_goes_with_the_head() -> None:
    sizes = dense(tied=True)
    plan = plan_placement(sizes, [Budget(ONE, 300)])
    assert (plan.embed, plan.head) == (ONE, ONE)
    assert plan.layers == (HOST, HOST, ONE, ONE)
    both = plan_placement(sizes, [Budget(ONE, 230), Budget(TWO, 230)])
    assert both.embed == both.head == TWO


def test_a_head_that_does_not_fit_stays_on_the_host() -> None:
    plan = plan_placement(dense(head=300), [Budget(ONE, 210)])
    assert (plan.head, plan.layers) == (HOST, (HOST, HOST, ONE, ONE))


@pytest.mark.parametrize("budgets", [[], [Budget(ONE, 0)], [Budget(ONE, 9), Budget(TWO, 0)]])
def test_nothing_fits(budgets: list[Budget]) -> None:
    for sizes in (dense(), experts(), dense(tied=True)):
        assert plan_placement(sizes, budgets) == Placement.whole(HOST, 4)


def test_banks_of_experts_go_first() -> None:
    """The layers stay with the card, as long as they fit without their banks; then the first of them go, too."""
    plan = plan_placement(experts(), [Budget(ONE, 60 + 2 * 90)])
    assert plan.layers == (ONE,) * 4
    assert plan.banks == (HOST, HOST, ONE, ONE)
    assert (plan.embed, plan.head) == (HOST, ONE)
    assert held(plan, experts()) == {HOST: 190, ONE: 240}
    plan = plan_placement(experts(), [Budget(ONE, 45)])
    assert plan.layers == (HOST, HOST, ONE, ONE)
    assert plan.banks == (HOST,) * 4


def test_cards_are_filled_in_proportion_to_their_budgets() -> None:
    sizes = ModelBytes(0, (LayerBytes(10),) * 12, 0)
    plan = plan_placement(sizes, [Budget(ONE, 100), Budget(TWO, 50), Budget(THREE, 50)])
    assert plan.layers == (ONE,) * 6 + (TWO,) * 3 + (THREE,) * 3
    tight = plan_placement(sizes, [Budget(ONE, 69), Budget(TWO, 51)])  # in proportion, the second would hold 51.0 of 50
    assert held(tight, sizes)[ONE] <= 69
    assert HOST in tight.devices


def test_any_plan_keeps_within_the_budgets_and_in_order() -> None:
    random = Random(0)
    for _ in range(2000):
        bank = random.choice([0, random.randint(1, 400)])
        layers = tuple(
            LayerBytes(random.randint(1, 60), bank, random.randint(0, 9)) for _ in range(random.randint(1, 12))
        )
        sizes = ModelBytes(random.randint(0, 99), layers, random.randint(0, 99), random.random() < 0.5)
        budgets = [
            Budget(torch.device("cuda", number), random.randint(0, sizes.total))
            for number in range(random.randint(0, 3))
        ]
        plan = plan_placement(sizes, budgets)
        bytes_on = held(plan, sizes)
        assert sum(bytes_on.values()) == sizes.total
        assert all(bytes_on.get(budget.device, 0) <= budget.nbytes for budget in budgets)
        order = [HOST, *(budget.device for budget in budgets)]
        numbers = [order.index(device) for device in plan.layers]
        assert numbers == sorted(numbers), "the stream goes through the devices once"
        assert all(at in (plan.layers[index], HOST) for index, at in enumerate(plan.banks))
        assert not sizes.tied or plan.embed == plan.head
        shares = plan.shares(sizes)
        assert {share.device: share.nbytes for share in shares} == {str(at): size for at, size in bytes_on.items()}
        assert sum(share.layers for share in shares) == len(layers)
        assert sum(share.banks for share in shares) == (len(layers) if bank else 0)


def test_more_room_never_means_less_on_the_cards() -> None:
    sizes = experts(8)
    on_host = [
        held(plan_placement(sizes, [Budget(ONE, room)]), sizes).get(HOST, 0) for room in range(0, sizes.total + 9)
    ]
    assert all(later <= earlier for earlier, later in pairwise(on_host))
    assert on_host[-1] == 0


@pytest.mark.parametrize("family", CONFIGS)
def test_every_weight_is_in_one_part(family: str) -> None:
    """The parts weigh what the model does, and a bank what its experts do."""
    with torch.device("meta"):
        model = build(config_of(family)).to(torch.bfloat16)
    weights = {name: weight.nbytes for name, weight in model.named_parameters()}
    states = state_bytes(model, torch.bfloat16)
    sizes = measure_parts(model, weights, states)
    assert sizes.total == sum(weights.values()) + sum(states)
    banks = [module for module in model.modules() if isinstance(module, ExpertBank)]
    assert sum(layer.bank for layer in sizes.layers) == sum(w.nbytes for bank in banks for w in bank.parameters())
    assert (max(layer.bank for layer in sizes.layers) > 0) == (family in MOE)
    assert sizes.tied == model.config.tie_word_embeddings
    assert sum(states) == model.make_state().nbytes_at(16)


@pytest.fixture(autouse=True)
def _short_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their state would outweigh weights as small as these."""
    monkeypatch.setattr(placement, "STATE_CONTEXT", 16)


def spread_evenly(total: int) -> list[Budget]:
    """Two cards of which neither holds the model, though both together do."""
    return [Budget(CARD, total * 2 // 3), Budget(OTHER_CARD, total * 2 // 3)]


def one_small_card(total: int) -> list[Budget]:
    return [Budget(CARD, total // 2)]


def two_small_cards(total: int) -> list[Budget]:
    return [Budget(CARD, total * 2 // 5), Budget(OTHER_CARD, total * 2 // 5)]


def load(source: Checkpoint, scheme: str | None, budgets: list[Budget]) -> LanguageModel:
    if scheme is None:
        return load_model(source, budgets=budgets)
    return load_quantized(source, spec=QuantSpec(scheme), head_scheme="int8", dtype=torch.float32, budgets=budgets)


def deep(family: str, layers: int) -> dict[str, object]:
    return {"n_layers" if family == "dbrx" else "num_hidden_layers": layers}


@pytest.mark.parametrize("plan", [spread_evenly, one_small_card, two_small_cards])
@pytest.mark.parametrize("scheme", [None, "nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_plan_changes_no_number(family: str, scheme: str | None, plan, tmp_path: Path) -> None:
    """Prompts, steps, padding, windows that go round, copies and files of a state: the numbers are the CPU's."""
    source = Checkpoint.open(write_family(tmp_path, family, torch.float32, **deep(family, 4)))
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7)
    mask[1, :3] = 0
    plain = load(source, scheme, [])
    with PretendDevices() as devices:
        total = sum(share.nbytes for share in load(source, scheme, [Budget(CARD, 1 << 40)]).shares)
        spread = load(source, scheme, plan(total))
        _check_places(spread, plan, family)
        state = spread.make_state(2)
        answers = [spread(ids[:, :7].to(spread.device), attention_mask=mask, state=state)]
        answers += [spread(part.to(spread.device), state=state) for part in ids[:, 7:].split([1, 1, 31], 1)]
        spread.load_state(_saved(state, tmp_path))
        again = spread(ids[:, :1].to(spread.device), state=state.clone())
        full = spread(ids.to(spread.device), output_hidden_states=True)
        where = {devices.where(buffer) for layer in state.layers for buffer in layer.buffers}
        assert where == set(spread.decoder.placement.layers)
    before = plain.make_state(2)
    expected = [plain(ids[:, :7], attention_mask=mask, state=before)]
    expected += [plain(part, state=before) for part in ids[:, 7:].split([1, 1, 31], 1)]
    expected.append(plain(ids[:, :1], state=before))
    for ours, theirs in zip([*answers, again], expected, strict=True):
        same(ours.logits, theirs.logits)
    same(full.logits, plain(ids).logits)


def same(answer: Tensor, expected: Tensor) -> None:
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()


def _check_places(model: LanguageModel, plan, family: str) -> None:
    """That the plan does what its name says."""
    places = model.decoder.placement
    assert places is not None
    assert (CPU in places.devices) == (plan is not spread_evenly)
    assert (OTHER_CARD in places.devices) == (plan is not one_small_card)
    if family in MOE and plan is not spread_evenly:
        assert places.banks != places.layers


def _saved(state, folder: Path) -> Path:
    state.save(folder / "state")
    return folder / "state"


@torch.no_grad()
def test_the_stream_moves_only_where_the_device_changes(tmp_path: Path) -> None:
    source = Checkpoint.open(write_family(tmp_path / "m", "mixtral", torch.float32, **deep("mixtral", 4)))
    ids = torch.tensor([[3]])
    with PretendDevices() as devices:
        total = sum(share.nbytes for share in load(source, None, [Budget(CARD, 1 << 40)]).shares)
        model = load(source, None, two_small_cards(total))
        state, places = model.make_state(), model.decoder.placement
        devices.moves.clear()
        model(ids, state=state)
        away = sum(bank != layer for bank, layer in zip(places.banks, places.layers, strict=True))
        tables, visits = 3, 3 * away  # positions, cosines, sines; tokens, numbers of experts, their weights
        into, across = devices.moves.count((CPU, CARD)), devices.moves.count((CARD, OTHER_CARD))
        back = sum(there == CPU for _, there in devices.moves)
        assert places.layers == (CARD, CARD, OTHER_CARD, OTHER_CARD)
        assert (across, back) == (1 + tables, visits)
        assert into + devices.moves.count((CPU, OTHER_CARD)) == 1 + away
        plain = load(source, None, [])
        devices.moves.clear()
        plain(ids, state=plain.make_state())
        assert not devices.moves


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_on_the_host_the_kernels_go_on(family: str, tmp_path: Path) -> None:
    """A split model is never noted as a list of kernels; one on the CPU alone is what it was."""
    source = Checkpoint.open(write_family(tmp_path, family))
    plain = load_model(source)
    assert plain.decoder.placement is None
    assert plain.shares == ()
    with PretendDevices():
        total = sum(share.nbytes for share in load(source, None, [Budget(CARD, 1 << 40)]).shares)
        spread = load(source, None, one_small_card(total))
        stepper = spread.stepper(spread.make_state())
        assert [len(stepper.feed(torch.tensor([[token]]).to(spread.device))) for token in (1, 2, 3)] == [1, 1, 1]
