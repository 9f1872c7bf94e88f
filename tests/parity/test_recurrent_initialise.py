"""A model made from nothing begins as transformers' does: each tensor the same, or of the same distribution."""

import statistics
from random import Random
from typing import Any

import pytest
import torch
from parity.families import FALCON_MAMBA, RECURRENT_GEMMA, FamilyRow, reference_class
from torch import Tensor

from lmx.core.loader import HEAD_NAMES, build
from lmx.core.model import LanguageModel
from lmx.core.registry import family_of

WIDTHS: dict[str, dict[str, Any]] = {
    "falcon_mamba": {"hidden_size": 96, "intermediate_size": 224, "vocab_size": 301, "tie_word_embeddings": False},
    "recurrent_gemma": {
        "hidden_size": 96,
        "intermediate_size": 200,
        "vocab_size": 301,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "lru_width": 128,
        "attention_bias": True,
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "attention"],
        "tie_word_embeddings": False,
    },
}
VARIANTS: list[tuple[FamilyRow, dict[str, Any]]] = [
    (FALCON_MAMBA, {"use_bias": True, "use_conv_bias": True, "num_hidden_layers": 3}),
    (FALCON_MAMBA, {"rescale_prenorm_residual": True, "num_hidden_layers": 3}),
    (FALCON_MAMBA, {"time_step_init_scheme": "constant", "time_step_scale": 2.0, "initializer_range": 0.02}),
    (FALCON_MAMBA, {"time_step_min": 1e-5, "time_step_max": 0.5, "time_step_floor": 1e-2}),
    (RECURRENT_GEMMA, {}),
    (RECURRENT_GEMMA, {"w_init_variance_scale": 0.3, "conv1d_width": 2}),
]


def both_from_nothing(row: FamilyRow, changes: dict[str, Any]) -> tuple[Any, LanguageModel]:
    arguments = row.random_config(Random(0), 0) | WIDTHS[row.model_type] | changes
    config = reference_class(row, "Config")(**arguments)
    torch.manual_seed(1)
    reference = reference_class(row, "ForCausalLM")(config)
    model = build(config.to_dict())
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(torch.nan)  # whatever is not initialised shows
    torch.manual_seed(2)
    model.reset_parameters()
    return reference, model


def alike(name: str, mine: Tensor, theirs: Tensor) -> None:
    """Equal where theirs is no sample; else of the same mean, deviation and quantiles, to six deviations of chance."""
    assert mine.shape == theirs.shape, name
    if theirs.unique().numel() <= 16:
        assert torch.equal(mine, theirs), name
        return
    n, spread = theirs.numel(), float(theirs.std())
    assert abs(mine.unique().numel() - theirs.unique().numel()) < 0.2 * n, name
    assert torch.equal((mine == 0).sum(), (theirs == 0).sum()), name  # the padding's embedding
    assert abs(float(mine.mean() - theirs.mean())) < 6 * spread * (2 / n) ** 0.5, name
    # The deviation of a normal sample's deviation is spread / sqrt(2 n); that of the others here is smaller.
    assert abs(float(mine.std()) - spread) < 6 * spread / n**0.5, name
    a, b = (statistics.quantiles(tensor.flatten().tolist(), n=8) for tensor in (mine, theirs))
    # A quantile of a sample of n deviates by about 1 / (density sqrt(n)); 12 spreads per sqrt(n) is far from chance.
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 12 * spread / n**0.5, name
    # A uniform distribution ends, a normal one does not.
    ends = [float((t - t.mean()).abs().max() / t.std()) for t in (mine, theirs)]
    assert (ends[0] < 2.4) == (ends[1] < 2.4), name


@pytest.mark.parametrize(("row", "changes"), VARIANTS, ids=str)
def test_same_distributions(row: FamilyRow, changes: dict[str, Any]) -> None:
    reference, model = both_from_nothing(row, changes)
    table = family_of({"model_type": row.model_type}).names(model.config)
    theirs = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        hub = HEAD_NAMES.get(name) or table.hub_name(name.removeprefix("decoder."))
        alike(hub, weight.detach(), theirs.pop(hub).detach())
    assert not theirs
