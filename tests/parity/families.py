"""One row for each family that transformers is the yardstick of: random small configs, and how to build both models.

A test module loops over `FAMILIES`; a new family joins all of them with a row here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from parity import configs
from parity.configs import PAD, VOCAB, Config
from torch import Tensor

from lmx.core.checkpoint import Checkpoint
from lmx.core.heads import HeadKind
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SEEDS = range(12)


@dataclass(frozen=True)
class FamilyRow:
    """random_config: keyword arguments of transformers' config class; index runs through the cases that must occur.

    respell: rewrites a saved config.json into another spelling (transformers 4's) of the same model.
    title: how transformers' class names begin. left_padding: whether transformers is right about it.
    windowed: an index whose model forgets keys after fewer tokens than the tests' conversations have, if any.
    positions: whether it takes position_ids. noise: whether training draws random numbers.
    embeddings_first: whether its hidden states begin with the embeddings and leave out the last layer's bare answer.
    one_width: whether every random weight of a fresh model is normal with the config's deviation.
    """

    model_type: str
    title: str
    random_config: Callable[[Random, int], Config]
    respell: Callable[[Config, int], None]
    attention: bool = True
    router: bool = True
    left_padding: bool = True
    windowed: int | None = None
    positions: bool = True
    noise: bool = True
    embeddings_first: bool = True
    one_width: bool = True

    def __str__(self) -> str:
        return self.model_type


@dataclass(frozen=True)
class Pair:
    """A transformers model and ours, with the same weights."""

    row: FamilyRow
    config: Config
    reference: Any
    ours: LanguageModel


FAMILIES = (
    FamilyRow("mixtral", "Mixtral", configs.mixtral_config, configs.flat_rope, windowed=2),
    FamilyRow("olmoe", "Olmoe", configs.olmoe_config, configs.flat_rope),
    FamilyRow("dbrx", "Dbrx", configs.dbrx_config, configs.published_dbrx),
    # Left padding: transformers lets it into the convolution of both where biases make it differ from zero, and into
    # the recurrence of the second.
    FamilyRow(
        *("falcon_mamba", "FalconMamba", configs.falcon_mamba_config, configs.as_saved),
        attention=False,
        router=False,
        left_padding=False,
        positions=False,
        noise=False,
        embeddings_first=False,
        one_width=False,
    ),
    FamilyRow(
        *("recurrent_gemma", "RecurrentGemma", configs.recurrent_gemma_config, configs.older_recurrent_gemma),
        router=False,
        left_padding=False,
        windowed=9,
        one_width=False,
    ),
)


FALCON_MAMBA, RECURRENT_GEMMA = RECURRENT = FAMILIES[3:]


def reference_class(row: FamilyRow, kind: str) -> Any:
    """transformers' class for `Config`, `Model`, `ForCausalLM`, `ForSequenceClassification`."""
    return getattr(transformers, row.title + kind)


def build_reference(row: FamilyRow, config: Config, kind: str = "ForCausalLM", seed: int = 0) -> Any:
    """A transformers model with random weights of a size that makes logits differ; norms and biases vary, too."""
    torch.manual_seed(seed)
    model = reference_class(row, kind)(reference_class(row, "Config")(**config))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1 or torch.equal(weight, weight[:1].expand_as(weight)):
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def load_ours(row: FamilyRow, reference: Any, index: int = 0, head: HeadKind = "causal") -> LanguageModel:
    """Our model from the folder that transformers saves."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        reference.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        row.respell(config, index)
        (folder / "config.json").write_text(json.dumps(config))
        return load_model(Checkpoint.open(folder), head=head)


@cache
def pair(row: FamilyRow, index: int) -> Pair:
    """The index-th random small model of a family."""
    config = row.random_config(Random(f"{row.model_type} {index}"), index)
    reference = build_reference(row, config, seed=index)
    return Pair(row, config, reference, load_ours(row, reference, index))


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids other than the special ones."""
    return torch.randint(PAD + 1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of ids [length] as one batch with its mask, padded on the left, the right or both sides."""
    width = max(map(len, rows)) + (2 if side == "both" else 0)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        start = {"left": width - len(tokens), "right": 0, "both": (width - len(tokens)) // 2}[side]
        ids[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
    return ids, mask


def close(ours: Tensor, reference: Tensor, tolerance: float = 1e-4) -> None:
    """Equal shapes, and no element further apart than the tolerance."""
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= tolerance
