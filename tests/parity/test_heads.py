"""Classification heads: against transformers where it has the class, else its base model and the same linear."""

from random import Random

import pytest
import torch
from parity.families import FAMILIES, PAD, FamilyRow, build_reference, close, load_ours, padded, pair, random_ids
from torch import Tensor

from lmx.core.errors import UsageError
from lmx.core.heads import HeadKind, last_real_token
from lmx.core.model import LanguageModel

BOTH: list[HeadKind] = ["sequence", "token"]
CLASSES = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
LENGTHS = (9, 2, 6)


def config_of(row: FamilyRow, **changes: object) -> dict[str, object]:
    return row.random_config(Random(str(row)), 0) | {"num_labels": 3} | changes


def batch(side: str = "right") -> tuple[Tensor, Tensor]:
    return padded([random_ids(length, seed=length) for length in LENGTHS], side)


SEQUENCE_LABELS = {
    "classes": ({"num_labels": 3}, torch.tensor([2, 0, 1])),
    "yes or no": ({"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])),
    "number": ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
    "several numbers": ({"num_labels": 3, "problem_type": "regression"}, torch.linspace(-1, 1, 9).view(3, 3)),
    "named": ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([0, 2, 1])),
}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SEQUENCE_LABELS)
def test_mixtral_sequences(kind: str, side: str) -> None:
    changes, labels = SEQUENCE_LABELS[kind]
    row = FAMILIES[0]
    reference = build_reference(row, config_of(row, **changes), CLASSES["sequence"])
    ours = load_ours(row, reference, head="sequence")
    ids, mask = batch(side)
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels)
    answer = ours(ids, attention_mask=mask, labels=labels)
    close(answer.logits, expected.logits)
    close(answer.loss, expected.loss)
    if side == "right":
        close(ours(ids).logits, expected.logits)  # the padding token says where a row ends, as in transformers


@torch.no_grad()
def test_mixtral_tokens() -> None:
    row = FAMILIES[0]
    reference = build_reference(row, config_of(row), CLASSES["token"])
    ours = load_ours(row, reference, head="token")
    ids, mask = batch()
    labels = (ids % 3).masked_fill(mask == 0, -100)
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels)
    answer = ours(ids, attention_mask=mask, labels=labels)
    close(answer.logits[mask.bool()], expected.logits[mask.bool()])
    close(answer.loss, expected.loss)
    for model in (reference, ours):
        model.train()
        for part in model.modules():
            if part is not model and not isinstance(part, torch.nn.Dropout) and not hasattr(part, "score"):
                part.training = False  # only the classifier's own dropout
    torch.manual_seed(0)
    expected = reference(input_ids=ids, attention_mask=mask)
    torch.manual_seed(0)
    dropped = ours(ids, attention_mask=mask)
    close(dropped.logits[mask.bool()], expected.logits[mask.bool()])
    assert (dropped.logits - answer.logits).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("row", FAMILIES, ids=str)
@pytest.mark.parametrize("head", [*BOTH, "none"])
def test_heads_on_the_base_model(row: FamilyRow, head: HeadKind) -> None:
    """A checkpoint saved without a head: the classifier begins at random, the decoder is the file's."""
    reference = build_reference(row, config_of(row), "Model")
    torch.manual_seed(3)
    ours = load_ours(row, reference, head=head)
    ids, mask = batch()
    hidden = reference(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = ours(ids, attention_mask=mask).logits
    if head == "none":
        close(logits[mask.bool()], hidden[mask.bool()])
        return
    score = ours.head.score
    assert score.weight.std() == pytest.approx(ours.config.initializer_range, rel=0.3)
    assert (score.bias is not None) == (head == "token")
    expected = torch.nn.functional.linear(hidden, score.weight, score.bias)
    if head == "token":
        close(logits[mask.bool()], expected[mask.bool()])
    else:
        close(logits, expected[torch.arange(3), mask.sum(1) - 1])


def test_where_a_sequence_ends() -> None:
    ids = torch.tensor([[5, 6, PAD, PAD], [PAD, 5, 6, 7], [5, PAD, 6, PAD]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    assert last_real_token(ids, None, PAD, 4, 3).tolist() == [1, 3, 2]
    assert last_real_token(ids, mask, PAD, 4, 3).tolist() == [2, 3, 3]  # a mask knows better than the token
    assert last_real_token(None, torch.ones(2, 4), None, 4, 2).tolist() == [3, 3]
    assert last_real_token(None, None, None, 4, 1).tolist() == [3]
    with pytest.raises(UsageError, match="attention_mask"):
        last_real_token(ids, None, None, 4, 3)


def test_labels_that_fit_no_head() -> None:
    row = FAMILIES[0]
    causal = pair(row, 0).ours
    ids = random_ids(2, 5)
    with pytest.raises(UsageError, match="labels have shape"):
        causal(ids, labels=ids, logits_to_keep=1)
    headless: LanguageModel = load_ours(row, pair(row, 0).reference, head="none")
    with pytest.raises(UsageError, match="without a head"):
        headless(ids, labels=ids)
