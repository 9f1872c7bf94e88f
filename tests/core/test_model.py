"""Arguments that do not fit together are refused in a sentence, before anything is computed."""

import pytest
import torch
from parity.families import FAMILIES, FamilyRow, pair, random_ids

from lmx.core.errors import UsageError

ONES = torch.ones


@pytest.mark.parametrize("row", FAMILIES, ids=str)
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"input_ids": random_ids(5)}, "the input has shape"),
        ({"input_ids": random_ids(2, 5), "position_ids": torch.arange(4)[None]}, "position_ids has shape"),
        ({"input_ids": random_ids(2, 5), "position_ids": torch.arange(5)}, "position_ids has shape"),
        ({"input_ids": random_ids(2, 5), "position_ids": torch.arange(15).view(3, 5)}, "position_ids has shape"),
        ({"input_ids": random_ids(2, 5), "attention_mask": ONES(2, 4)}, "attention_mask has shape"),
        ({"input_ids": random_ids(2, 5), "attention_mask": ONES(1, 5)}, "attention_mask has shape"),
        ({}, "either input_ids or inputs_embeds"),
    ],
)
def test_misfits(row: FamilyRow, wrong: dict[str, torch.Tensor], what: str) -> None:
    model = pair(row, 0).ours
    state = model.make_state(2)
    with pytest.raises(UsageError, match=what):
        model(**wrong, state=state if len(wrong) > 1 else None)
    assert state.length == 0


@pytest.mark.parametrize("row", FAMILIES[:3], ids=str)
@torch.no_grad()
def test_texts_packed_in_a_row_do_not_see_each_other(row: FamilyRow) -> None:
    """Where given positions fall back, another text begins, as in transformers; a gap is only a gap."""
    both, ids = pair(row, 0), random_ids(1, 20)
    positions = torch.cat((torch.arange(9), torch.arange(11)))[None]
    packed = both.ours(ids, position_ids=positions).logits
    expected = both.reference(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert (packed - expected).abs().max() < 1e-4
    assert (packed[:, 9:] - both.ours(ids[:, 9:]).logits).abs().max() < 1e-4
