"""A model made from nothing begins as transformers' does: which weights are normal, one or zero, and how wide."""

from random import Random

import pytest
import torch
from parity.families import FAMILIES, PAD, VOCAB, FamilyRow, random_ids, reference_class

from lmx.core.loader import bind, build
from lmx.core.registry import family_of


@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("row", FAMILIES, ids=str)
@torch.no_grad()
def test_random_weights(row: FamilyRow, std: float) -> None:
    torch.manual_seed(0)
    config = row.random_config(Random(str(row)), 2) | {"initializer_range": std}
    reference = reference_class(row, "ForCausalLM")(reference_class(row, "Config")(**config))
    raw = reference.config.to_dict()
    row.respell(raw, 0)
    with torch.device("meta"):
        ours = build(raw)
    ours.to_empty(device="cpu")
    for weight in ours.parameters():
        weight.fill_(float("nan"))
    ours.reset_parameters()

    theirs = dict(reference.named_parameters())
    table = family_of(raw).names(ours.config)
    pieces = bind(ours, table, {name: tuple(weight.shape) for name, weight in theirs.items()})
    assert pieces.keys() == dict(ours.named_parameters()).keys()
    normal = 0
    for name, weight in ours.named_parameters():
        expected = pieces[name].of(theirs[pieces[name].hub])
        if expected.std() == 0:
            assert torch.equal(weight, expected), name
            continue
        normal += 1
        spread = 5 / weight.numel() ** 0.5  # five standard errors
        assert weight.std() == pytest.approx(float(expected.std()), rel=2 * spread), name
        if row.one_width:
            assert weight.std() == pytest.approx(std, rel=spread), name
        assert abs(float(weight.mean() - expected.mean())) < 2 * spread * expected.std(), name
    assert normal > 3 * ours.config.layers
    blank = int(reference.get_input_embeddings().padding_idx is not None)
    assert ours.decoder.embed.weight[PAD].any() != blank
    assert ours.decoder.embed.weight.std(1).count_nonzero() == VOCAB - blank


@pytest.mark.parametrize("row", FAMILIES, ids=str)
def test_training_from_nothing(row: FamilyRow) -> None:
    """A few steps on one sequence bring its loss well below that of guessing."""
    torch.manual_seed(0)
    raw = reference_class(row, "Config")(**row.random_config(Random(str(row)), 0)).to_dict()
    row.respell(raw, 0)
    model = build(raw | {"initializer_range": 0.05})
    model.reset_parameters()
    ids = random_ids(1, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(torch.tensor(float(VOCAB)).log().item(), rel=0.3)
    assert losses[-1] < 0.5 * losses[0]
