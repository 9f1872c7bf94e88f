"""Heads of the two recurrent families over padding in any place, which transformers' base models get wrong: the
yardstick is their hidden states of each text alone, and the same linear layer.
"""

import pytest
import torch
import torch.nn.functional as F
from parity.families import RECURRENT, FamilyRow, Pair, close, load_ours, padded, pair, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmx.core.checkpoint import Checkpoint
from lmx.core.heads import ClassHead
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel

LENGTHS = (13, 4, 9)


@pytest.fixture(params=[(row, index) for row in RECURRENT for index in (0, 4, 7)], ids=lambda p: f"{p[0]}-{p[1]}")
def both(request: pytest.FixtureRequest) -> Pair:
    return pair(*request.param)


def rows() -> list[Tensor]:
    return [random_ids(length, seed=length) for length in LENGTHS]


def hidden(both: Pair, ids: Tensor) -> Tensor:
    """transformers' last hidden states of one unpadded text [length, hidden]."""
    base = both.reference.base_model
    for part in base.modules():  # RecurrentGemma keeps its state in its modules
        for name in ("recurrent_states", "conv1d_state"):
            if hasattr(part, name):
                setattr(part, name, None)
    states: Tensor = base(ids[None], use_cache=False).last_hidden_state[0]
    return states


def score(model: LanguageModel) -> torch.nn.Linear:
    assert isinstance(model.head, ClassHead)
    return model.head.score


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_sequence(both: Pair, side: str) -> None:
    model = load_ours(both.row, both.reference, head="sequence")
    ids, mask = padded(rows(), side)
    classes = both.config["num_labels"]
    expected = torch.stack([score(model)(hidden(both, row)[-1]) for row in rows()])
    labels = torch.tensor([0.5, 1.0, -2.0]) if classes == 1 else torch.tensor([0, 1, 0])
    answer = model(ids, attention_mask=mask, labels=labels)
    close(answer.logits, expected)
    loss = F.mse_loss(expected[:, 0], labels) if classes == 1 else F.cross_entropy(expected, labels)
    assert answer.loss is not None
    close(answer.loss, loss)
    assert score(model).bias is None


@torch.no_grad()
def test_token(both: Pair) -> None:
    model = load_ours(both.row, both.reference, head="token")
    ids, mask = padded(rows(), "left")
    labels = torch.randint(0, both.config["num_labels"], ids.shape).masked_fill(mask == 0, -100)
    answer = model(ids, attention_mask=mask, labels=labels)
    expected = [score(model)(hidden(both, row)) for row in rows()]
    for logits, row, real in zip(answer.logits, expected, mask.bool(), strict=True):
        close(logits[real], row)
    assert answer.loss is not None
    close(answer.loss, F.cross_entropy(torch.cat(expected), labels[mask.bool()]))
    assert score(model).bias is not None


@torch.no_grad()
@pytest.mark.parametrize("row", RECURRENT, ids=str)
def test_a_trained_head_is_loaded(row: FamilyRow, tmp_path_factory: pytest.TempPathFactory) -> None:
    both, folder = pair(row, 0), tmp_path_factory.mktemp("classifier")
    both.reference.save_pretrained(folder)
    weight = torch.randn(both.config["num_labels"], both.ours.config.hidden_size)
    file = folder / "model.safetensors"
    save_file({**load_file(file), "score.weight": weight}, file)
    model, ids = load_model(Checkpoint.open(folder), head="sequence"), random_ids(1, 6)
    close(model(ids).logits[0], hidden(both, ids[0])[-1] @ weight.T)
