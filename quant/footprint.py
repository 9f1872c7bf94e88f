"""What a model's weights weigh: in parameters, in bytes, and in bytes that a decode step reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lmx.core.heads import CausalHead
from lmx.core.layers.moe import ExpertBank
from lmx.core.model import LanguageModel
from lmx.quant.four_bit import FourBit
from lmx.quant.int8 import Int8
from lmx.quant.matmul import Matrix, QuantMatrix
from lmx.quant.modules import QuantExpertBank, QuantHead, QuantLinear

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Footprint:
    """parameters, nbytes: of all weights, an embedding that is also the output matrix once.

    step_bytes: what a decode step of one token reads of them: one row of the embedding, the experts that a token is
    sent to, and all the rest. body_parameters: those that every token of a prompt is multiplied by; head_parameters:
    those of the output matrix, which only the last token meets. scheme: how the matrices are stored, in words.
    """

    parameters: int
    nbytes: int
    step_bytes: float
    body_parameters: float
    head_parameters: int
    scheme: str


def measure_footprint(model: LanguageModel) -> Footprint:
    """Count a model's weights, as they are held."""
    embedding = model.decoder.embed.weight
    head = [part.matrix for part in _parts(model.head, 0)] if model.head is not None else []
    is_tied = isinstance(model.head, CausalHead) and not head
    body = list(_body(model))
    held = [embedding, *head, *(part.matrix for part in body)]
    read = embedding.nbytes if is_tied else embedding.nbytes / len(embedding)
    return Footprint(
        parameters=sum(_elements(matrix) for matrix in held) - _copied(model),
        nbytes=sum(matrix.nbytes for matrix in held),
        step_bytes=read + sum(matrix.nbytes for matrix in head) + sum(part.matrix.nbytes * part.share for part in body),
        body_parameters=sum(_elements(part.matrix) * part.share for part in body),
        head_parameters=sum(_elements(matrix) for matrix in head) or is_tied * embedding.numel(),
        scheme=_scheme(model, [part.matrix for part in body]),
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """A weight, and the share of it that a token needs on average."""

    matrix: Matrix
    share: float


def _body(model: LanguageModel) -> Iterator[_Part]:
    """Everything but the embedding and the head."""
    for name, child in model.decoder.named_children():
        if name != "embed":
            yield from _parts(child, model.config.experts_to_choose)


def _parts(module: nn.Module, chosen: int) -> Iterator[_Part]:
    if isinstance(module, ExpertBank | QuantExpertBank):
        share = chosen / len(module.gate)
        yield from (_Part(matrix, share) for bank in (module.gate, module.up, module.down) for matrix in bank)
        return
    if isinstance(module, QuantLinear):
        yield _Part(module.weight, 1.0)
    yield from (_Part(weight, 1.0) for weight in module.parameters(recurse=False))
    for child in module.children():
        yield from _parts(child, chosen)


def _elements(matrix: Matrix) -> int:
    return prod(matrix.shape)


def _copied(model: LanguageModel) -> int:
    """A tied output matrix that was quantized is a copy of the embedding, not more parameters."""
    is_copy = isinstance(model.head, QuantHead) and model.config.tie_word_embeddings
    return model.decoder.embed.weight.numel() if is_copy else 0


def _scheme(model: LanguageModel, matrices: list[Matrix]) -> str:
    """`nf4`, `nf4 double`, `int8`, or the dtype of what is not quantized; then that of a quantized head."""
    found = dict.fromkeys(_form(matrix) for matrix in matrices if not isinstance(matrix, Tensor))
    body = "+".join(found) or _dtype_name(model.decoder.embed.weight.dtype)
    if isinstance(model.head, QuantHead):
        return f"{body}, {_form(model.head.output.weight)} head"
    return body


def _form(matrix: QuantMatrix) -> str:
    if isinstance(matrix, Int8):
        return "int8"
    return f"{matrix.quant_type} double" if isinstance(matrix, FourBit) and matrix.nested else matrix.quant_type


def _dtype_name(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))
