"""Models on quantized matrices: from a checkpoint that holds them, or quantized while a plain one is loaded.

A checkpoint may have quantized more than our modules can compute with (a router, FalconMamba's step sizes, which
transformers quantizes too): such a weight is dequantized as it is loaded, which gives the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lmx.core.checkpoint import Source
from lmx.core.destinations import Destinations
from lmx.core.errors import InputError, UsageError
from lmx.core.files import quoted
from lmx.core.heads import CausalHead, HeadKind
from lmx.core.layers.moe import ExpertBank
from lmx.core.loader import assign_moved, build_bound, held_bytes, start_missing_head, stored_head
from lmx.core.mapped import Advice
from lmx.core.model import LanguageModel
from lmx.core.names import Piece
from lmx.core.native.compiled import library
from lmx.core.placement import HOST, Budget
from lmx.quant.four_bit import FourBit, quantize_4bit
from lmx.quant.int8 import quantize_int8
from lmx.quant.matmul import Matrix, QuantMatrix, dequantize
from lmx.quant.modules import QuantExpertBank, QuantHead, QuantLinear
from lmx.quant.plan import classify, layout_bytes, plan_source
from lmx.quant.quanto import Quanto, quantize_quanto
from lmx.quant.serialize import layout
from lmx.quant.spec import QuantSpec
from lmx.quant.stored import StoredMatrices

HeadScheme = Literal["int8", "nf4"]

_HEAD = "head.weight"


def load_quantized(
    source: Source,
    *,
    spec: QuantSpec | None = None,
    head: HeadKind = "causal",
    head_scheme: HeadScheme | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    budgets: Sequence[Budget] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LanguageModel:
    """Load a model whose linear layers and experts are quantized, as far as the checkpoint or `spec` says.

    On the CPU, matrices that the checkpoint holds stay views of its mapped files. Others are quantized one at a time:
    what memory it takes beside the model is that of the largest matrix, and no page of the source stays. For a card
    they are quantized by the CPU's kernels, which are as quick as the bus, so that a quarter of the bytes cross it and
    the card never holds 16 bits of them; on the card where those kernels were not built. Both give the same bytes.

    spec: quantize a plain checkpoint; None takes it as it is. head_scheme: quantize the matrix of the output head; of a
    model that ties it to the embedding only the head's copy is quantized. dtype: of all other weights; None keeps each
    as stored. device, budgets: as for `load_model`. progress: called with the parameters quantized so far and in all.

    Raises:
        UsageError: the checkpoint, or its head, is quantized already, or there is no head to quantize.
        InputError: config, names, shapes or sizes do not fit, or the method of quantization is not supported.

    """
    stored = StoredMatrices.read(source, dtype)
    if spec is not None and stored.matrices:
        raise UsageError(f"{quoted(source.label)} is quantized already", "load it as it is, or quantize the original")
    model, pieces = build_bound(source.config, stored.shapes, head)
    _check_head(model, pieces, stored, head_scheme)
    wanted = _wanted(model, pieces, stored) if spec is None else _planned(source, spec)
    weights = _all_bytes(model, source, pieces, wanted, head_scheme, dtype) if budgets else {}
    places = Destinations.plan(model, weights, dtype or torch.float32, device, budgets)
    quantized: dict[str, QuantMatrix] = {}
    total, done = sum(weight.numel() for name, weight in model.named_parameters() if name in wanted), 0
    for name, piece in pieces.items():
        if name not in wanted:
            assign_moved(model, name, source, piece, _plain(source, stored, piece, dtype), dtype, places)
            continue
        there = places.of(name)
        if piece.hub in stored.matrices:
            quantized[name] = _moved(source, stored, piece, there)
        else:
            quantized[name] = _quantize(source, piece, spec or QuantSpec(), there)
        done += model.get_parameter(name).numel()
        progress(done, total)
    install(model, quantized)
    start_missing_head(model, dtype, places.placement.head)
    if head_scheme is not None:
        _quantize_head(model, head_scheme, places.placement.head)
    places.settle()
    return model.eval()


def quantize_matrix(x: Tensor, spec: QuantSpec, name: str = "the tensor") -> QuantMatrix:
    """Quantize a matrix [out, in] by a spec. Raises InputError as the function of its scheme."""
    if spec.quanto_type is not None:
        return quantize_quanto(x, spec.quanto_type, name)
    if spec.four_bit_type is None:
        return quantize_int8(x, name)
    return quantize_4bit(x, spec.four_bit_type, spec.block_size, spec.double_quant, name)


def _wanted(model: LanguageModel, pieces: Mapping[str, Piece], stored: StoredMatrices) -> dict[str, int]:
    """The weights that stay quantized, with their bytes: stored so, and of a module that can compute with it."""
    roles = classify(model)
    return {
        name: stored.matrices[piece.hub].nbytes
        for name, piece in pieces.items()
        if piece.hub in stored.matrices and (roles[name].kept is None or name == _HEAD) and piece.rows is None
    }


def _planned(source: Source, spec: QuantSpec) -> dict[str, int]:
    weights = plan_source(source, spec).weights
    return {weight.ours: layout_bytes(weight.layout(spec)) for weight in weights if weight.kept is None}


def stored_bytes(source: Source, dtype: torch.dtype) -> tuple[LanguageModel, dict[str, int]]:
    """A checkpoint's model without weights, and the bytes of each as it is loaded. Raises InputError."""
    stored = StoredMatrices.read(source, dtype)
    model, pieces = build_bound(source.config, stored.shapes, stored_head(source.config, stored.shapes))
    return model, _all_bytes(model, source, pieces, _wanted(model, pieces, stored), None, dtype)


def _all_bytes(
    model: LanguageModel,
    source: Source,
    pieces: Mapping[str, Piece],
    quantized: Mapping[str, int],
    head_scheme: HeadScheme | None,
    dtype: torch.dtype | None,
) -> dict[str, int]:
    """The bytes of every weight as it will be held."""
    sizes = held_bytes(model, source, pieces, dtype) | dict(quantized)
    if head_scheme is not None:
        vocabulary, hidden = model.config.vocab_size, model.config.hidden_size
        sizes[_HEAD] = layout_bytes(layout(_HEAD, (vocabulary, hidden), QuantSpec(head_scheme), torch.bfloat16))
    return sizes


def _plain(source: Source, stored: StoredMatrices, piece: Piece, dtype: torch.dtype | None) -> Tensor:
    matrix = stored.matrices.get(piece.hub)
    return piece.of(source.tensor(piece.hub) if matrix is None else dequantize(matrix, dtype))


def _moved(source: Source, stored: StoredMatrices, piece: Piece, there: torch.device) -> QuantMatrix:
    """A stored matrix on its device; the pages of its file that it no longer needs are let go."""
    matrix, bulk = stored.matrices[piece.hub].to(there), stored.bulk[piece.hub]
    if there != HOST:
        source.advise(bulk, Advice.DONT_NEED)
    if not isinstance(matrix, FourBit):
        return matrix
    narrow = matrix.narrowed()
    if narrow is not matrix:
        source.advise(f"{bulk}.absmax", Advice.DONT_NEED)
    return narrow


def _quantize(source: Source, piece: Piece, spec: QuantSpec, there: torch.device) -> QuantMatrix:
    """Read one matrix, quantize it, and let its pages go; optimum-quanto's types always on the CPU."""
    weight = piece.of(source.tensor(piece.hub))
    if library() is None and spec.quanto_type is None:
        weight = weight.to(there)
    matrix = quantize_matrix(weight, spec, piece.hub).to(there)
    if piece.rows is None:  # else its neighbours in the same tensor come next
        source.advise(piece.hub, Advice.DONT_NEED)
    return _kept(matrix)


def _kept(matrix: QuantMatrix) -> QuantMatrix:
    """A matrix that was just made, where a model keeps it."""
    if isinstance(matrix, FourBit):
        return matrix.narrowed().lasting()
    return matrix if isinstance(matrix, Quanto) else matrix.lasting()


def install(model: LanguageModel, quantized: Mapping[str, QuantMatrix]) -> None:
    """Put modules on quantized matrices in the places of those on plain ones; every other weight is there already."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{path}.weight" in quantized:
            model.set_submodule(path, QuantLinear(quantized[f"{path}.weight"], module.bias))
        elif isinstance(module, ExpertBank) and any(name.startswith(f"{path}.") for name in quantized):
            model.set_submodule(path, _bank(path, module, quantized))
    if _HEAD in quantized:
        model.head = QuantHead(model.config, quantized[_HEAD])


def _bank(path: str, bank: ExpertBank, quantized: Mapping[str, QuantMatrix]) -> QuantExpertBank:
    def part(name: str, kept: nn.ParameterList) -> list[Matrix]:
        return [quantized.get(f"{path}.{name}.{i}", weight.detach()) for i, weight in enumerate(kept)]

    return QuantExpertBank(part("gate", bank.gate), part("up", bank.up), part("down", bank.down), bank.activation)


def _check_head(
    model: LanguageModel, pieces: Mapping[str, Piece], stored: StoredMatrices, scheme: HeadScheme | None
) -> None:
    if scheme is None:
        return
    if model.kind != "causal":
        raise UsageError(f"head={model.kind!r} has no output matrix to quantize", "leave the head's scheme out")
    if _HEAD in pieces and pieces[_HEAD].hub in stored.matrices:
        raise UsageError("the checkpoint's output head is quantized already", "leave the head's scheme out")


def _quantize_head(model: LanguageModel, scheme: HeadScheme, there: torch.device) -> None:
    head = model.head
    if not isinstance(head, CausalHead):
        raise InputError("the model has no output head", "load it with head='causal'")
    weight = model.decoder.embed.weight if head.weight is None else head.weight
    matrix = quantize_matrix(weight.detach().to(there), QuantSpec(scheme), "the output head")
    model.head = QuantHead(model.config, _kept(matrix))
