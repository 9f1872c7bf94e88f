"""FalconMamba's own: the decay rates that are kept between calls are always those of the weights."""

from collections.abc import Callable

import pytest
import torch
from parity.families import FALCON_MAMBA, load_ours, pair, random_ids

from lmx.core.model import LanguageModel


def fresh() -> LanguageModel:
    return load_ours(FALCON_MAMBA, pair(FALCON_MAMBA, 2).reference)


def in_place(model: LanguageModel) -> None:
    model.decoder.layers[0].mixer.A_log.add_(0.5)


def by_data(model: LanguageModel) -> None:
    model.decoder.layers[0].mixer.A_log.data = model.decoder.layers[0].mixer.A_log.data + 0.5


def by_loading(model: LanguageModel) -> None:
    weights = model.state_dict()
    model.load_state_dict({n: w + 0.5 if n == "decoder.layers.0.mixer.A_log" else w for n, w in weights.items()})


def by_assigning(model: LanguageModel) -> None:
    mixer = model.decoder.layers[0].mixer
    mixer.A_log = torch.nn.Parameter(mixer.A_log + 0.5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [in_place, by_data, by_loading, by_assigning])
def test_changed_decays_are_seen(change: Callable[[LanguageModel], None], mode: Callable[[], object]) -> None:
    model, untouched, ids = fresh(), fresh(), random_ids(1, 9)
    with mode():
        before = model(ids).logits
        assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        change(model)
        change(untouched)
    with mode():
        assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, untouched(ids).logits)


def test_a_changed_dtype_is_seen() -> None:
    model, ids = fresh(), random_ids(1, 9)
    with torch.no_grad():
        model(ids)
        narrow = model.to(torch.bfloat16)(ids).logits
        assert torch.equal(narrow, fresh().to(torch.bfloat16)(ids).logits)


def test_a_model_that_ran_can_be_trained() -> None:
    model, ids = fresh(), random_ids(1, 9)
    with torch.inference_mode():
        before = model(ids).logits.clone()
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    weight = model.decoder.layers[0].mixer.A_log
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    with torch.no_grad():
        weight.sub_(weight.grad / weight.grad.abs().max())
        assert not torch.equal(model(ids).logits, before)
