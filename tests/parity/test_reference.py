"""Everything a call returns, against transformers with the same weights, over random small configs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parity.families import FAMILIES, SEEDS, FamilyRow, Pair, close, padded, pair, random_ids
from torch import Tensor

from lmx.core.errors import UsageError
from lmx.core.loader import bind
from lmx.core.model import Output
from lmx.core.registry import family_of

LENGTH = 21
LENGTHS = (LENGTH, 5, 13)


@pytest.fixture(
    scope="module", params=[(row, index) for row in FAMILIES for index in SEEDS], ids=lambda p: f"{p[0]}-{p[1]}"
)
def both(request: pytest.FixtureRequest) -> Pair:
    row, index = request.param
    return pair(row, index)


def asked_for(row: FamilyRow) -> dict[str, bool]:
    """The optional outputs that the family has."""
    asked = {"output_hidden_states": True}
    if row.attention:
        asked["output_attentions"] = True
    if row.router:
        asked["output_router_logits"] = True
    return asked


def hidden_states(both: Pair, answer: Output, expected: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Ours beside transformers', where both have them."""
    ours, theirs = answer.hidden_states, expected.hidden_states
    assert ours is not None
    assert len(ours) == len(theirs) == both.ours.config.layers + 1
    yield ours[-1], theirs[-1]
    yield from (
        zip(ours[:-1], theirs, strict=False) if both.row.embeddings_first else zip(ours[1:-1], theirs, strict=False)
    )


def all_close(ours: tuple[Tensor, ...] | None, reference: tuple[Tensor, ...]) -> None:
    assert ours is not None
    assert len(ours) == len(reference)
    for mine, other in zip(ours, reference, strict=True):
        close(mine, other)


@torch.no_grad()
def test_outputs(both: Pair) -> None:
    ids = random_ids(2, LENGTH)
    labels = ids.masked_fill(random_ids(2, LENGTH, seed=1) % 5 == 0, -100)
    expected = both.reference(input_ids=ids, labels=labels, use_cache=False, **asked_for(both.row))
    answer = both.ours(ids, labels=labels, **asked_for(both.row))
    assert expected.logits.abs().max() > 1
    close(answer.logits, expected.logits)
    close(answer.loss, expected.loss)
    for mine, other in hidden_states(both, answer, expected):
        close(mine, other)
    if both.row.attention:
        all_close(answer.attentions, expected.attentions)
    if both.row.router:
        all_close(answer.router_logits, expected.router_logits)
        close(answer.aux_loss, expected.aux_loss)
    plain = both.ours(ids, labels=labels)  # scaled_dot_product_attention, and no auxiliary loss
    close(plain.logits, expected.logits)
    close(plain.loss, both.reference(input_ids=ids, labels=labels, use_cache=False).loss)
    assert plain.hidden_states is plain.attentions is plain.router_logits is plain.aux_loss is None


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(both: Pair, side: str) -> None:
    if side == "left" and not both.row.left_padding:
        pytest.skip("transformers is wrong about left padding in this family; tests/parity/test_splits.py covers it")
    ids, mask = padded([random_ids(length, seed=length) for length in LENGTHS], side)
    real, labels = mask.bool(), ids.masked_fill(mask == 0, -100)
    # transformers scores a row's first token by what the padding before it answers, which means nothing
    scored = labels.masked_fill(torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0, -100)
    expected = both.reference(input_ids=ids, attention_mask=mask, labels=scored, use_cache=False, **asked_for(both.row))
    answer = both.ours(ids, attention_mask=mask, labels=labels, **asked_for(both.row))
    close(answer.logits[real], expected.logits[real])
    close(both.ours(ids, attention_mask=mask).logits[real], expected.logits[real])
    close(answer.loss, expected.loss)
    for mine, other in hidden_states(both, answer, expected):
        close(mine[real], other[real])
    for mine, other in zip(answer.attentions or (), expected.get("attentions") or (), strict=True):
        close(mine.transpose(1, 2)[real], other.transpose(1, 2)[real])
    if both.row.router:
        for mine, other in zip(answer.router_logits, expected.router_logits, strict=True):
            close(mine[real.flatten()], other[real.flatten()])
        close(answer.aux_loss, expected.aux_loss)


@torch.no_grad()
def test_positions_and_embeddings(both: Pair) -> None:
    ids = random_ids(2, LENGTH)
    if not both.row.positions:
        embeds = both.reference.get_input_embeddings()(ids)
        close(both.ours(inputs_embeds=embeds).logits, both.reference(inputs_embeds=embeds, use_cache=False).logits)
        return
    steps = torch.randint(1, 4, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    embeds = both.reference.get_input_embeddings()(ids)
    everything = torch.ones_like(ids)  # without a mask, transformers takes gaps in position_ids for packed sequences
    expected = both.reference(
        inputs_embeds=embeds, attention_mask=everything, position_ids=steps.cumsum(1), use_cache=False
    ).logits
    close(both.ours(ids, position_ids=steps.cumsum(1)).logits, expected)
    close(both.ours(inputs_embeds=embeds, position_ids=steps.cumsum(1)).logits, expected)
    with pytest.raises(UsageError, match="either input_ids or inputs_embeds"):
        both.ours(ids, inputs_embeds=embeds)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 3, 20]), torch.tensor([[0, 3], [20, 2]])], ids=str)
def test_logits_to_keep(both: Pair, keep: int | Tensor) -> None:
    ids = random_ids(2, LENGTH)
    close(
        both.ours(ids, logits_to_keep=keep).logits,
        both.reference(input_ids=ids, logits_to_keep=keep, use_cache=False).logits,
    )


def gradients(both: Pair) -> dict[str, Tensor]:
    """transformers' gradients by our names; its fused experts are cut by the name table, as weights are on loading."""
    theirs = dict(both.reference.named_parameters())
    config = {"model_type": both.row.model_type}
    table = family_of(config).names(both.ours.config)
    pieces = bind(both.ours, table, {name: tuple(weight.shape) for name, weight in theirs.items()})
    return {name: piece.of(theirs[piece.hub].grad) for name, piece in pieces.items()}


def test_gradients(both: Pair) -> None:
    ids, mask = padded([random_ids(length, seed=length) for length in LENGTHS], "right")
    labels = ids.masked_fill(mask == 0, -100)
    asked = {"output_router_logits": True} if both.row.router else {}
    for model in (both.reference, both.ours):
        model.zero_grad()
        cache = {"use_cache": False} if model is both.reference else {}
        model(input_ids=ids, attention_mask=mask, labels=labels, **asked, **cache).loss.backward()
    expected = gradients(both)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert expected.keys() == dict(both.ours.named_parameters()).keys()
    for name, weight in both.ours.named_parameters():
        mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
        close(mine, expected[name], 1e-5 * scale)


def test_noise_in_training(both: Pair) -> None:
    """Dropout and router jitter draw the same numbers from the same seed, in training only."""
    if not both.row.noise or not (both.row.router or "attention" in both.config["block_types"]):
        pytest.skip("nothing random in this model")
    ids = random_ids(2, LENGTH)
    logits = {}
    for model in (both.reference, both.ours):
        torch.manual_seed(5)
        model.train()
        cache = {"use_cache": False} if model is both.reference else {}
        logits[model] = model(input_ids=ids, output_attentions=True, **cache).logits.detach()
        model.eval()
    close(logits[both.ours], logits[both.reference])
    assert (both.ours(ids).logits - logits[both.ours]).abs().max() > 1e-2
