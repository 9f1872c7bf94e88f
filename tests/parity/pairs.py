"""A transformers model with random weights, and ours over the checkpoint that it saves."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmx.core.checkpoint import Checkpoint
from lmx.core.heads import HeadKind
from lmx.core.loader import HEAD_NAMES, load_model
from lmx.core.model import LanguageModel
from lmx.core.registry import family_of


@torch.no_grad()
def shake(model: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Move every weight off the zeros and ones of its initialisation, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator) * scale)


def ours(reference: PreTrainedModel, head: HeadKind = "causal", dtype: torch.dtype | None = None) -> LanguageModel:
    """Our model over the checkpoint that `reference` saves."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return load_model(Checkpoint.open(Path(folder)), head=head, dtype=dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4, what: str = "") -> None:
    """Fail unless the shapes are equal and the largest difference is within the tolerance; the message has both."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} against {list(expected.shape)}"
    difference = (actual.detach().float() - expected.detach().float()).abs().max().item()
    assert difference <= tolerance, f"{what}: {difference:.2e} apart, {tolerance:.0e} allowed"


def gradients_agree(model: LanguageModel, reference: PreTrainedModel, tolerance: float = 1e-4) -> None:
    """Fail unless every weight of ours has the gradient of its namesake, to the tolerance of the largest of its own."""
    table = family_of({"model_type": model.family}).names(model.config)
    theirs = dict(reference.named_parameters())
    compared = set()
    for name, weight in model.named_parameters():
        hub = HEAD_NAMES.get(name) or table.hub_name(name.removeprefix("decoder."))
        expected = theirs[hub].grad
        assert weight.grad is not None, f"{name} has no gradient"
        assert expected is not None, f"{hub} has no gradient"
        close(weight.grad, expected, tolerance * max(1.0, expected.abs().max().item()), f"gradient of {name}")
        compared.add(hub)
    assert compared == {name for name, weight in theirs.items() if weight.grad is not None}
