"""What becomes of each weight of a checkpoint: quantized, or kept with a reason. Read from headers alone.

Linear layers and the matrices of experts are quantized. Which weight is what, the modules of the model say, built on
the meta device from config.json: no name in a file decides.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from lmx.core.checkpoint import Source
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.heads import CausalHead, ClassHead
from lmx.core.layers.moe import ExpertBank
from lmx.core.layers.norm import OffsetRMSNorm, RMSNorm
from lmx.core.layers.rg_lru import RGLRU
from lmx.core.loader import DECODER_PREFIX, HEAD_NAMES, bind, build, stored_head
from lmx.core.mapped import ITEM_SIZES
from lmx.core.model import LanguageModel
from lmx.core.models.falcon_mamba import Mixer
from lmx.core.names import NameTable, Piece, Shape
from lmx.core.registry import family_of
from lmx.core.safetensors_file import TensorInfo
from lmx.quant.quanto import is_too_small
from lmx.quant.quanto_files import quanto_matrices
from lmx.quant.serialize import FLOATS, Layout, layout
from lmx.quant.spec import QuantSpec

EMBEDDING = "embedding"
HEAD = "output head"
NORM = "norm"
BIAS = "bias"
ROUTER = "router"
CONVOLUTION = "convolution"
SCAN = "scan parameter"
GATE = "recurrence gate"
SKIPPED = "named by --skip"
NO_SMALLER = "would not get smaller"
TOO_SMALL = "too small for the format"


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """One weight of the model and its fate.

    name: its tensor in the output; ours: the parameter of the model; dtype: as safetensors spells that of the source;
    piece: where in the source it lies; kept: why it is not quantized, or None; expert: its place in a bank, or None.
    """

    name: str
    ours: str
    shape: Shape
    dtype: str
    piece: Piece
    kept: str | None
    bank: str | None = None
    expert: int = 0

    @property
    def parameters(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def source_bytes(self) -> int:
        """How many bytes it takes in the source."""
        return self.parameters * ITEM_SIZES[self.dtype]

    def layout(self, spec: QuantSpec) -> Layout:
        """Name, dtype and shape of every tensor that it becomes if it is quantized."""
        return layout(self.name, self.shape, spec, FLOATS[self.dtype])

    @property
    def module(self) -> str:
        """The hub's name of the module that it belongs to."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Plan:
    """All weights in the order in which they are written: layer by layer, a layer's experts one by one."""

    weights: tuple[PlannedWeight, ...]
    spec: QuantSpec

    @property
    def parameters(self) -> int:
        """The model's parameters."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def quantized_parameters(self) -> int:
        """Those of them that are quantized."""
        return sum(weight.parameters for weight in self.weights if weight.kept is None)

    @property
    def source_bytes(self) -> int:
        """Bytes of all weights as the source has them."""
        return sum(weight.source_bytes for weight in self.weights)

    @property
    def kept_modules(self) -> list[str]:
        """Modules that other tools must not take for quantized: whatever has a matrix that was kept, and the head.

        Those with other weights alone (norms, scans) are never taken for it, and their names may stand for more.
        """
        names = {w.module: None for w in self.weights if w.kept and w.name.endswith(".weight") and len(w.shape) > 1}
        return list(names | {"lm_head": None})


def plan_source(source: Source, spec: QuantSpec) -> Plan:
    """Plan for a checkpoint. Raises InputError where it does not fit its config, or is quantized already."""
    return make_plan(source.config, source.infos, spec)


def make_plan(config: Mapping[str, object], infos: Mapping[str, TensorInfo], spec: QuantSpec) -> Plan:
    """Plan for a config.json and the headers of the weight files.

    Raises InputError where tensors are missing, unknown or of a wrong shape, where a matrix is stored in a dtype that
    cannot be quantized, and for a checkpoint that is quantized already.
    """
    _check_plain(config, infos)
    family = family_of(config)
    with torch.device("meta"):
        model = build(config, stored_head(config, infos), tied=False if "lm_head.weight" in infos else None)
    table = family.names(model.config)
    pieces = bind(model, table, {name: info.shape for name, info in infos.items()})
    named = _Naming(table, bare=not any(name.startswith(table.base_prefix) for name in infos))
    weights = []
    for ours, role in sorted(classify(model).items(), key=lambda item: item[1].rank):
        piece = pieces[ours]
        name = named(ours)
        dtype = infos[piece.hub].dtype
        kept = role.kept or _kept_here(name, piece.shape, dtype, spec)
        weights.append(PlannedWeight(name, ours, piece.shape, dtype, piece, kept, role.bank, role.expert))
    return Plan(tuple(weights), spec)


@dataclass(frozen=True, slots=True)
class Role:
    """What a parameter is in the model. kept: why it is never quantized, or None; rank: its place in the output."""

    kept: str | None
    rank: tuple[int, int, int]
    bank: str | None = None
    expert: int = 0


def classify(model: LanguageModel) -> dict[str, Role]:
    """The role of every parameter, from the type of the module that owns it."""
    roles: dict[str, Role] = {}
    for place, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, ExpertBank):
            roles |= dict(_expert_roles(path, module, place))
        elif not isinstance(module, nn.ParameterList):
            for name, _ in module.named_parameters(recurse=False):
                kept = _kept_always(model, path, module, name)
                roles[f"{path}.{name}"] = Role(kept, (place, 0, 0))
    return roles


def _expert_roles(path: str, bank: ExpertBank, place: int) -> Iterator[tuple[str, Role]]:
    for part, name in enumerate(("gate", "up", "down")):
        for expert in range(len(bank.gate)):
            yield f"{path}.{name}.{expert}", Role(None, (place, expert, part), path, expert)


def _kept_always(model: LanguageModel, path: str, module: nn.Module, name: str) -> str | None:
    """Why a parameter stays in 16 or 32 bits whatever the options are; None for the weight of a linear layer."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, CausalHead | ClassHead) or isinstance(parent, ClassHead):
        return HEAD
    if isinstance(module, RMSNorm | OffsetRMSNorm | nn.LayerNorm):
        return NORM
    if isinstance(parent, Mixer) and module is parent.dt_proj:
        return SCAN
    if isinstance(module, nn.Linear):
        return BIAS if name == "bias" else ROUTER if _has_experts(parent) else None
    if name in ("conv_weight", "conv_bias"):
        return CONVOLUTION
    return GATE if isinstance(module, RGLRU) else SCAN


def _has_experts(module: nn.Module) -> bool:
    """The linear layer beside a bank of experts is what chooses among them."""
    return any(isinstance(child, ExpertBank) for child in module.children())


def _kept_here(name: str, shape: Shape, dtype: str, spec: QuantSpec) -> str | None:
    """Why a matrix that could be quantized is not, with these options."""
    if spec.skips(name.removesuffix(".weight")):
        return SKIPPED
    if dtype not in FLOATS:
        raise InputError(f"{quoted(name)} is stored as {dtype}, which cannot be quantized", _ORIGINAL)
    if spec.quanto_type is not None and is_too_small(shape, spec.quanto_type):
        return TOO_SMALL
    stored = prod(shape) * ITEM_SIZES[dtype]
    return NO_SMALLER if layout_bytes(layout(name, shape, spec, FLOATS[dtype])) >= stored else None


def layout_bytes(tensors: Layout) -> int:
    """How many bytes the tensors of a layout take."""
    return sum(prod(shape) * dtype.itemsize for dtype, shape in tensors.values())


class _Naming:
    """What the output calls our parameters; `bare`: without the decoder's prefix, like the source."""

    def __init__(self, table: NameTable, bare: bool) -> None:
        self._table, self._bare = table, bare

    def __call__(self, ours: str) -> str:
        if ours in HEAD_NAMES:
            return HEAD_NAMES[ours]
        name = self._table.matrix_name(ours.removeprefix(DECODER_PREFIX))
        return name.removeprefix(self._table.base_prefix) if self._bare else name


def _check_plain(config: Mapping[str, object], infos: Mapping[str, TensorInfo]) -> None:
    if config.get("quantization_config") is not None or any(quanto_matrices(infos)):
        raise InputError("the checkpoint is quantized already", _ORIGINAL)


_ORIGINAL = "quantize the 16 or 32 bit original"
