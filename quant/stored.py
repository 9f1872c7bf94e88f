"""The quantized matrices that a checkpoint holds, and the checkpoint with them dequantized, as a plain `Source`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from lmx.core.checkpoint import Source
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON
from lmx.core.loader import DECODER_PREFIX, HEAD_NAMES, build, stored_head
from lmx.core.mapped import ITEM_SIZES, Advice, stored_name
from lmx.core.names import Shape
from lmx.core.registry import family_of
from lmx.core.safetensors_file import TensorInfo
from lmx.quant.codebook import FourBitType
from lmx.quant.matmul import QuantMatrix, dequantize
from lmx.quant.quanto_files import is_packed, is_quanto, quanto_matrices, read_quanto
from lmx.quant.serialize import FLOATS, STATE_PREFIX, int8_companions, read_four_bit, read_int8
from lmx.quant.spec import QuantSpec

_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_HINT = "the checkpoint is damaged or in another format: download it again, or take the model it was made from"


def find_matrices(source: Source) -> dict[str, tuple[str, ...]]:
    """Every quantized matrix of a checkpoint by name, with all the tensors that make it up; from the headers alone.

    The tensor with the bulk comes first. bitsandbytes announces itself in config.json, optimum-quanto does not. Raises
    InputError for another quantization, and for a config.json that announces one where the files hold none.
    """
    config, infos = source.config.get("quantization_config"), source.infos
    if config is not None:
        if not isinstance(config, dict):
            raise InputError(f"{quoted(source.label)}: quantization_config in config.json is no object", _HINT)
        QuantSpec.from_config(config)
    found = dict(_four_bit_matrices(infos)) | dict(_int8_matrices(infos)) | dict(quanto_matrices(infos))
    if config is not None and not found:
        raise InputError(f"{quoted(source.label)} holds no quantized tensors, but config.json announces them", _HINT)
    return found


def plain_infos(source: Source, matrices: Mapping[str, tuple[str, ...]]) -> dict[str, TensorInfo]:
    """The tensors that are no part of the `matrices` found. Raises InputError for one that is not of 16 or 32 bits."""
    members = {name for tensors in matrices.values() for name in tensors}
    plain = {name: info for name, info in source.infos.items() if name not in members}
    for info in plain.values():
        if info.dtype not in FLOATS:
            raise InputError(
                f"{quoted(source.label)}: tensor {quoted(info.name)} is stored as {info.dtype}, and is no part of a "
                "quantized matrix",
                _HINT,
            )
    return plain


def _four_bit_matrices(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[str, ...]]]:
    suffixes = tuple(f".{STATE_PREFIX}{quant_type}" for quant_type in get_args(FourBitType))
    for state in infos:
        for suffix in suffixes:
            if state.endswith(suffix):
                name = state.removesuffix(suffix)
                companions = (f"{name}.{companion}" for companion in _COMPANIONS)
                yield name, (name, *(each for each in companions if each in infos), state)


def _int8_matrices(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, info in infos.items():
        scb, weight_format = int8_companions(name)
        if info.dtype == "I8" and scb in infos:
            yield name, (name, scb, weight_format) if weight_format in infos else (name, scb)


@dataclass(frozen=True)
class StoredMatrices:
    """The quantized matrices of a checkpoint, on its own bytes, and the shapes that all its weights really have.

    bulk: the tensor that holds the codes of each matrix.
    """

    matrices: Mapping[str, QuantMatrix]
    shapes: Mapping[str, Shape]
    bulk: Mapping[str, str]

    @classmethod
    def read(cls, source: Source, dtype: torch.dtype | None = None) -> "StoredMatrices":
        """Put all matrices together; their bulk is not touched: it stays where the file is mapped.

        dtype: what int8 matrices are dequantized to, which their format does not record; None is that of most of the
        checkpoint's other weights. Raises InputError where tensors do not fit each other.
        """
        groups = find_matrices(source)
        plain = plain_infos(source, groups)
        dtype = dtype or common_dtype(plain)
        packed = packed_shapes(source, groups, plain)
        matrices = {name: _read(source, name, members, dtype, packed.get(name)) for name, members in groups.items()}
        bulk = {name: members[0] for name, members in groups.items()}
        return cls(matrices, _shapes(source, matrices, plain, bulk), bulk)


def packed_shapes(
    source: Source, groups: Mapping[str, tuple[str, ...]], plain: Mapping[str, TensorInfo]
) -> dict[str, Shape]:
    """The shapes that config.json gives to the matrices whose tensors do not tell them, optimum-quanto's packed ones.

    Raises InputError for a matrix that the model does not have.
    """
    packed = [name for name, members in groups.items() if is_packed(members)]
    if not packed:
        return {}
    names = plain.keys() | groups.keys()
    family = family_of(source.config)
    with torch.device("meta"):
        tied = False if "lm_head.weight" in names else None
        model = build(source.config, stored_head(source.config, names), tied=tied)
    table, shapes = family.names(model.config), {n: tuple(p.shape) for n, p in model.named_parameters()}
    heads = {hub: ours for ours, hub in HEAD_NAMES.items()}
    prefix = "" if any(name.startswith(table.base_prefix) for name in names) else table.base_prefix

    def shape_of(name: str) -> Shape:
        ours = heads.get(name) or next((DECODER_PREFIX + ours for ours, _ in table.pieces(prefix + name, ())), name)
        if ours not in shapes:
            raise InputError(f"{quoted(name)}: the model of config.json has no such matrix", _HINT)
        return shapes[ours]

    return {name: shape_of(name) for name in packed}


def _shapes(
    source: Source, matrices: Mapping[str, QuantMatrix], plain: Mapping[str, TensorInfo], bulk: Mapping[str, str]
) -> dict[str, Shape]:
    """In the order of the file, a matrix where its bytes are."""
    matrix_at = {tensor: name for name, tensor in bulk.items()}
    return {
        matrix_at.get(tensor, tensor): matrices[matrix_at[tensor]].shape if tensor in matrix_at else plain[tensor].shape
        for tensor in source.infos
        if tensor in matrix_at or tensor in plain
    }


def common_dtype(infos: Mapping[str, TensorInfo]) -> torch.dtype:
    """The dtype of most bytes of these tensors; float32 where there are none."""
    counted = dict.fromkeys(FLOATS, 0)
    for info in infos.values():
        counted[info.dtype] += info.nbytes
    return FLOATS[max(counted, key=lambda name: counted[name])]


def _read(source: Source, name: str, members: tuple[str, ...], dtype: torch.dtype, shape: Shape | None) -> QuantMatrix:
    tensors = {member: source.tensor(member) for member in members if member in source.infos}
    if is_quanto(members):
        return read_quanto(name, tensors, shape)
    is_int8 = members[1] == int8_companions(name)[0]
    return read_int8(name, tensors, dtype) if is_int8 else read_four_bit(name, tensors)


class DequantizedSource:
    """A quantized checkpoint as a plain one; implements `Source`. Each matrix is made when asked for.

    dtype: of every tensor; None keeps the plain ones and gives the matrices the dtype that they had before.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None = None) -> None:
        """Read the headers and the small tensors. Raises InputError as `StoredMatrices.read`."""
        self._source, self._dtype = source, dtype
        self._stored = StoredMatrices.read(source, dtype)

    @property
    def label(self) -> str:
        """The quantized checkpoint's own."""
        return self._source.label

    @property
    def files(self) -> tuple[Path, ...]:
        """The quantized checkpoint's own."""
        return self._source.files

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What `tensor` returns; `offset` is where the stored tensor begins."""
        return {name: self._info(name, shape) for name, shape in self._stored.shapes.items()}

    @property
    def config(self) -> dict[str, JSON]:
        """config.json without its quantization, and with the new dtype."""
        config = {key: value for key, value in self._source.config.items() if key != "quantization_config"}
        if self._dtype is None:
            return config
        key = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
        return config | {key: str(self._dtype).removeprefix("torch.")}

    @property
    def generation_config(self) -> dict[str, JSON] | None:
        """The quantized checkpoint's own."""
        return self._source.generation_config

    def tensor(self, name: str) -> Tensor:
        """A weight, dequantized where it was quantized."""
        matrix = self._stored.matrices.get(name)
        if matrix is not None:
            return dequantize(matrix, self._dtype)
        tensor = self._source.tensor(name)
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def advise(self, name: str, advice: Advice) -> None:
        """Pass it on for the bulk of the tensor."""
        self._source.advise(self._stored.bulk.get(name, name), advice)

    def _info(self, name: str, shape: Shape) -> TensorInfo:
        info, matrix = self._source.infos[self._stored.bulk.get(name, name)], self._stored.matrices.get(name)
        was = FLOATS[info.dtype] if matrix is None else matrix.dtype
        dtype = stored_name(self._dtype or was)
        return replace(info, name=name, dtype=dtype, shape=shape, nbytes=prod(shape) * ITEM_SIZES[dtype])
