"""Which model a conversation was held with, so that its state is never continued with another one."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.core.checkpoint import Checkpoint
from lmx.core.files import open_regular, read_range
from lmx.core.session_record import Identity
from lmx.core.text.files import tokenizer_path

if TYPE_CHECKING:
    import torch

_SAMPLE_BYTES = 1 << 16
_SAMPLES = 8
_TEXT_FILES = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def scheme_of(
    checkpoint: Checkpoint, dtype: "torch.dtype", quantize: str | None = None, head_scheme: str | None = None
) -> str:
    """How a model's weights are held, in short: `bf16`, `nf4/bf16`, `nf4/bf16/head-int8`. Raises InputError."""
    from lmx.quant.spec import QuantSpec

    scheme = quantize
    if checkpoint.is_quantized:
        config = checkpoint.quantization_config
        scheme = "quanto" if config is None else QuantSpec.from_config(config).scheme
    name = str(dtype).removeprefix("torch.")
    head = None if head_scheme is None else f"head-{head_scheme}"
    return "/".join(part for part in (scheme, _DTYPES.get(name, name), head) if part is not None)


def identity_of(name: str, checkpoint: Checkpoint, scheme: str) -> Identity:
    """A checkpoint run with `scheme`, which says how its weights are held. Raises InputError, NotFoundError.

    The weights count by their config, their table and samples of their bytes, since reading all of them would take
    longer than anything else at the start.
    """
    weights = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for info in checkpoint.infos.values():
        weights.update(f"{info.name} {info.dtype} {info.shape}\n".encode())
    for file in checkpoint.files:
        for sample in _samples(file):
            weights.update(sample)
    return Identity(name, weights.hexdigest()[:32], scheme, _text_digest(checkpoint.folder))


def _samples(file: Path) -> list[bytes]:
    with open_regular(file) as fd:
        size = os.fstat(fd).st_size
        last = max(0, size - _SAMPLE_BYTES)
        offsets = sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)})
        return [read_range(fd, min(_SAMPLE_BYTES, size - offset), offset, file) for offset in offsets]


def _text_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in (tokenizer_path(folder), *(folder / name for name in _TEXT_FILES)):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
