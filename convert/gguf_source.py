"""A GGUF file as a checkpoint: the hub's names and shapes, config and tokenizer, from its header alone.

Plain tensors (F32, F16, BF16) are views of the mapped file; blocks are dequantized when a tensor is asked for. What
llama.cpp changed (rotary pairs, Mamba's decay, experts in one tensor) is changed back. The tokenizer's files and the
configs are written to a temporary folder that lives as long as the checkpoint, for whoever reads a folder.
Importing this imports no torch.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lmx.convert.gguf_config import Architecture, Metadata, config_of
from lmx.convert.gguf_file import GGUFFile, open_files, split_siblings
from lmx.convert.gguf_header import DAMAGED
from lmx.convert.gguf_layout import LAYOUTS, BlockLayout
from lmx.convert.gguf_names import Change
from lmx.convert.gguf_vocabulary import generation_config_of, tokenizer_files
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.files import names_in, quoted
from lmx.core.jsonfile import to_json
from lmx.core.mapped import ITEM_SIZES, Advice

if TYPE_CHECKING:
    import torch

SUFFIX = ".gguf"


class GGUFCheckpoint(Checkpoint):
    """A GGUF, or all files of a split one, opened by its header; implements `Source`.

    A tensor of blocks is returned in float32, unless `read_blocks_as` says otherwise. `main_dtype` is what to run or
    write the model in.
    """

    def __init__(self, files: Sequence[GGUFFile], metadata: Metadata, architecture: Architecture) -> None:
        """Use `GGUFCheckpoint.open`."""
        self._temporary = tempfile.TemporaryDirectory(prefix="lmx-gguf-")
        super().__init__(Path(self._temporary.name), files)
        self.architecture, self.header = architecture, metadata
        self._block_dtype = "F32"
        self._parts = {name: (file.data, part) for file in files for name, part in file.parts.items()}
        self._write_small_files()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open a `.gguf` file; of a split one, any of its files.

        Raises:
            NotFoundError: there is no such file, or we may not read it.
            InputError: it is damaged, hostile, of another architecture or in a type that lmx does not read.

        """
        parts = open_files(folder)
        return cls(parts.files, parts.metadata, parts.architecture)

    @property
    def label(self) -> str:
        """The (first) file's path."""
        return str(self.files[0])

    @property
    def main_dtype(self) -> str:
        """The stored dtype of most bytes; bfloat16 where most are blocks, whose numbers are made when read."""
        counted: dict[str, int] = {}
        for _, part in self._parts.values():
            kind = part.layout.plain or "BF16"
            counted[kind] = counted.get(kind, 0) + part.nbytes
        return max(counted, key=lambda kind: counted[kind])

    @property
    def layouts(self) -> dict[str, int]:
        """How many bytes of the file are of which of GGML's types."""
        counted: dict[str, int] = {}
        for _, part in self._parts.values():
            counted[part.layout.name] = counted.get(part.layout.name, 0) + part.nbytes
        return counted

    @property
    def quantization(self) -> str | None:
        """What a GGUF of blocks is called by: the type of most of them; None for plain weights."""
        blocks = {name: size for name, size in self.layouts.items() if LAYOUTS[name].plain is None}
        return f"{max(blocks, key=lambda name: blocks[name])} (GGUF)" if blocks else None

    def mapped_bytes(self, dtype: str) -> int:
        """The bytes that stay where they lie in the file when the model runs in a dtype; all others are made anew."""
        kept = (part for _, part in self._parts.values() if part.layout.plain == dtype)
        return sum(part.nbytes for part in kept if part.change in (Change.NOTHING, Change.CONVOLUTION))

    def read_blocks_as(self, dtype: str) -> None:
        """From now on return dequantized tensors in another dtype than F32, and say so in `infos`."""
        blocks = {name for name, (_, part) in self._parts.items() if part.layout.plain is None}
        self._block_dtype = dtype
        self.infos = {
            name: replace(info, dtype=dtype, nbytes=info.parameters * ITEM_SIZES[dtype]) if name in blocks else info
            for name, info in self.infos.items()
        }

    def layout_of(self, name: str) -> BlockLayout:
        """How a tensor is stored. Raises InputError for an unknown name."""
        return self._parts[self._info(name).name][1].layout

    def tensor(self, name: str) -> "torch.Tensor":
        """A tensor by the hub's name: a view of the file where it is plain and nothing is to undo, else a new one."""
        from lmx.convert.gguf_tensors import read_part

        data, part = self._parts[self._info(name).name]
        tensor = read_part(data, part, self._block_dtype, f"{self.label}: {quoted(name)}")
        if part.layout.plain is None:  # its bytes are not needed again
            data.advise(Advice.DONT_NEED, part.offset, part.nbytes)
        return tensor

    def advise(self, name: str, advice: Advice) -> None:
        """Tell the kernel what will happen to a tensor's bytes (`FileMap.advise`)."""
        data, part = self._parts[self._info(name).name]
        data.advise(advice, part.offset, part.nbytes)

    def _write_small_files(self) -> None:
        """The files that a folder of the hub has beside the weights."""
        where, names = quoted(self.label), self.infos
        table = self.architecture.table
        embedding = next(rule.hub for rule in table.rules if rule.gguf == "token_embd.weight")
        if embedding not in names:
            raise InputError(f"{where} has no tensor 'token_embd.weight'", DAMAGED)
        config = config_of(
            self.header,
            vocab_size=names[embedding].shape[0],
            tied="lm_head.weight" not in names,
            dtype={"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[self.main_dtype],
            where=where,
        )
        small: dict[str, bytes] = {"config.json": to_json(config)}
        generation = generation_config_of(self.header, where)
        if generation:
            small["generation_config.json"] = to_json(generation)
        small |= tokenizer_files(self.header, self.architecture.model_type, names[embedding].shape[0], where)
        for name, data in small.items():
            (self.folder / name).write_bytes(data)


def find_gguf(folder: Path) -> Path | None:
    """The one GGUF of a folder that has no other weights, or None. Raises InputError where there are several."""
    names = names_in(folder)
    if any(name.endswith((".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json")) for name in names):
        return None
    found = sorted(split_siblings({name for name in names if name.endswith(SUFFIX)}))
    if len(found) > 1:
        raise InputError(f"{quoted(str(folder))} holds {len(found)} GGUFs", f"name one: {folder / found[0]}")
    return folder / found[0] if found else None
