"""What a checkpoint is and what it needs to run, from its headers and configs alone: no tensor is read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmx.api import check_runnable, open_checkpoint, open_headers
from lmx.convert.gguf_source import GGUFCheckpoint
from lmx.convert.hub_headers import HeaderCheckpoint
from lmx.convert.original_source import OriginalCheckpoint
from lmx.convert.pull_events import Watcher, unwatched
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import LmxError
from lmx.core.files import read_bounded
from lmx.core.text.files import read_tokenizer_files
from lmx.dtypes import choose_dtype, stored_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from lmx.core.layers.moe import ExpertBank
    from lmx.core.model import LanguageModel
    from lmx.core.names import Shape
    from lmx.core.placement import Budget, Share
    from lmx.quant.stored import StoredMatrices

STATE_CONTEXT = 4096
"""The context at which the state's memory is given, or the model's own if that is shorter."""

_TEMPLATE_FILE = "chat_template.jinja"
_NOT_STATED = "not stated"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^license:[ \t]*([^\s#][^\n#]*)", re.MULTILINE)
_LICENSE_NAME = re.compile(r"^license_name:[ \t]*([^\s#][^\n#]*)", re.MULTILINE)
_README_BYTES = 1 << 20


@dataclass(frozen=True)
class Description:
    """The facts of one checkpoint. Sizes are in bytes; `active_parameters` are those that one token goes through.

    context_length: None where the architecture has no limit. quantization: None, or the scheme and its method.
    chat_template: the file that it stands in, or None. state_bytes: one conversation of `state_context` tokens.
    read_as: what a folder in a layout of its makers was taken for, else None. placement: what would lie on which
    device; empty where there is no card.
    """

    model: str
    architecture: str
    model_type: str
    parameters: int
    active_parameters: int
    dtype: str
    quantization: str | None
    size_on_disk: int
    weight_bytes: int
    state_bytes: int
    state_context: int
    context_length: int | None
    vocabulary: int
    chat_template: str | None
    license: str
    kernels: str
    read_as: str | None = None
    layers: int = 0
    placement: "tuple[Share, ...]" = ()

    @property
    def memory_to_run(self) -> int:
        """Weights and state together; what torch itself and the prompt's activations take comes on top."""
        return self.weight_bytes + self.state_bytes


def open_described(
    model: str | Path | None, *, revision: str | None = None, offline: bool = False, watch: Watcher = unwatched
) -> Checkpoint:
    """Find a model to describe; of one on the hub that is not here only headers are fetched. Raises as `lmx.load`."""
    checkpoint = open_headers(model, revision=revision, offline=offline)
    if isinstance(checkpoint, HeaderCheckpoint) and checkpoint.is_quantized:
        # What shapes a packed matrix had stands among the weights
        return open_checkpoint(model, revision=revision, offline=offline, watch=watch)
    check_runnable(checkpoint)
    return checkpoint


def describe(name: str, checkpoint: Checkpoint, budgets: "Sequence[Budget]" = ()) -> Description:
    """Describe a checkpoint. budgets: what could be taken of each card, for its placement.

    Raises InputError where it is broken or of an architecture that is not supported.
    """
    import torch

    from lmx.core.loader import bind, build
    from lmx.core.registry import family_of

    family, stored = family_of(checkpoint.config), _stored(checkpoint)
    dtype = choose_dtype(None, checkpoint)
    with torch.device("meta"):
        model = build(checkpoint.config, tied=False if "lm_head.weight" in stored.shapes else None).to(dtype)
        state = model.make_state()
    bind(model, family.names(model.config), stored.shapes)
    total = sum(weight.numel() for weight in model.parameters())
    context = min(STATE_CONTEXT, model.context_length or STATE_CONTEXT)
    return Description(
        model=name,
        architecture=family.title,
        model_type=family.model_type,
        parameters=total,
        active_parameters=total - _idle_parameters(model),
        dtype="+".join(stored.dtypes).lower(),
        quantization=stored.quantization,
        size_on_disk=sum(file.stat().st_size for file in _files(checkpoint)),
        weight_bytes=checkpoint.total_bytes if checkpoint.is_quantized else total * dtype.itemsize,
        state_bytes=state.nbytes_at(context),
        state_context=context,
        context_length=model.context_length,
        vocabulary=model.config.vocab_size,
        chat_template=_template_file(checkpoint),
        license=license_of(checkpoint.folder),
        kernels=_kernels(),
        read_as=checkpoint.title if isinstance(checkpoint, OriginalCheckpoint) else None,
        layers=model.config.layers,
        placement=_placement(checkpoint, dtype, budgets),
    )


def _placement(checkpoint: Checkpoint, dtype: "torch.dtype", budgets: "Sequence[Budget]") -> "tuple[Share, ...]":
    """What loading would put on which device."""
    if not budgets:
        return ()
    from lmx.core.placement import measure_parts, plan_placement, state_bytes
    from lmx.quant.apply import stored_bytes as weight_bytes

    model, weights = weight_bytes(checkpoint, dtype)
    sizes = measure_parts(model, weights, state_bytes(model, dtype))
    return plan_placement(sizes, budgets).shares(sizes)


def _kernels() -> str:
    """Which code multiplies on the CPU and, if there is one, on the CUDA device."""
    from lmx.core.gpu.launch import cuda_path
    from lmx.core.native.compiled import kernel_path

    on_cuda = cuda_path()
    return kernel_path() if on_cuda is None else f"{kernel_path()}, on CUDA {on_cuda}"


@dataclass(frozen=True)
class _Stored:
    """What a checkpoint's weights are: the shapes they really have, the dtypes of the plain ones, the quantization."""

    shapes: "Mapping[str, Shape]"
    dtypes: list[str]
    quantization: str | None = None


def _stored(checkpoint: Checkpoint) -> _Stored:
    if isinstance(checkpoint, GGUFCheckpoint):
        shapes = {info.name: info.shape for info in checkpoint.infos.values()}
        return _Stored(shapes, sorted(checkpoint.layouts), checkpoint.quantization)
    if not checkpoint.is_quantized:
        shapes = {info.name: info.shape for info in checkpoint.infos.values()}
        return _Stored(shapes, sorted(stored_bytes(checkpoint)))
    from lmx.quant.stored import StoredMatrices, find_matrices, plain_infos

    plain = plain_infos(checkpoint, find_matrices(checkpoint))
    stored = StoredMatrices.read(checkpoint)
    return _Stored(stored.shapes, sorted({info.dtype for info in plain.values()}), _scheme(checkpoint, stored))


def _scheme(checkpoint: Checkpoint, stored: "StoredMatrices") -> str:
    """The quantization in words: what config.json says, or which of optimum-quanto's types the matrices have."""
    from lmx.quant.quanto import Quanto
    from lmx.quant.spec import QuantSpec

    config = checkpoint.quantization_config
    if config is None:
        types = {matrix.quant_type for matrix in stored.matrices.values() if isinstance(matrix, Quanto)}
        return f"{', '.join(sorted(types))} (optimum-quanto)"
    spec = QuantSpec.from_config(config)
    return f"{spec.scheme}{' with double quantization' if spec.double_quant else ''} (bitsandbytes)"


def _idle_parameters(model: "LanguageModel") -> int:
    """The parameters of the experts that a token is not sent to."""
    from lmx.core.layers.moe import ExpertBank

    banks = [module for module in model.modules() if isinstance(module, ExpertBank)]
    chosen = model.config.experts_to_choose
    return sum(weight.numel() for bank in banks for part in _parts(bank) for weight in part[chosen:])


def _parts(bank: "ExpertBank") -> "tuple[list[Tensor], ...]":
    return list(bank.gate), list(bank.up), list(bank.down)


def _files(checkpoint: Checkpoint) -> list[Path]:
    """What is on the disk of a model."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return list(checkpoint.files)
    return [file for file in checkpoint.home.iterdir() if file.is_file()]


def _template_file(checkpoint: Checkpoint) -> str | None:
    """The file that the chat template stands in. Raises InputError for files that cannot be read."""
    folder = checkpoint.folder
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.files[0].name if (folder / _TEMPLATE_FILE).exists() else None
    if folder != checkpoint.home and not (folder / "tokenizer.json").exists():
        return None
    if read_tokenizer_files(folder).chat_template is None:
        return None
    return _TEMPLATE_FILE if (folder / _TEMPLATE_FILE).exists() else "tokenizer_config.json"


def license_of(folder: Path) -> str:
    """The licence that the model's card states (YAML front matter of README.md), else that a licence file is there."""
    try:
        front = _FRONT_MATTER.match(read_bounded(folder / "README.md", _README_BYTES).decode("utf-8", "replace"))
    except LmxError:
        front = None
    stated = (_LICENSE_NAME.search(front[1]) or _LICENSE.search(front[1])) if front is not None else None
    if stated is not None:
        return stated[1].strip().strip("\"'")
    names = sorted(file.name for file in folder.iterdir() if file.name.upper().startswith(("LICENSE", "LICENCE")))
    return f"see {names[0]}" if names else _NOT_STATED
