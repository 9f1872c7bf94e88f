"""The front door: from what a user calls a model to one that runs. Importing this imports no torch."""

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from lmx.convert.gguf_source import GGUFCheckpoint, find_gguf
from lmx.convert.hub import HubId, check_online, find_local, find_model
from lmx.convert.hub_headers import HeaderCheckpoint
from lmx.convert.originals import find_original
from lmx.convert.pickle_source import PickleCheckpoint, holds_pickles_only
from lmx.convert.pull_events import Watcher, unwatched
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError, NotFoundError, UsageError
from lmx.core.files import quoted
from lmx.core.registry import model_type_of
from lmx.core.text.engine import TextEngine
from lmx.device import Device, choose_budgets, choose_device
from lmx.dtypes import RUNNABLE, choose_dtype

if TYPE_CHECKING:
    import torch

    from lmx.core import model as core
    from lmx.core.config import ModelConfig
    from lmx.core.heads import HeadKind
    from lmx.core.layers.attention import Implementation
    from lmx.core.placement import Budget
    from lmx.language_model import LanguageModel
    from lmx.quant.apply import HeadScheme
    from lmx.quant.spec import QuantSpec, Scheme


def load(
    model: str | Path | None = None,
    *,
    device: Device | None = None,
    dtype: "torch.dtype | str | None" = None,
    quantize: "str | QuantSpec | None" = None,
    head: "HeadKind" = "causal",
    head_scheme: "HeadScheme | None" = None,
    gpu_memory: int | None = None,
) -> "LanguageModel":
    """Load a model, ready to be called or to generate.

    model: a checkpoint's folder, a GGUF, or a hub id `org/name[@revision]` that is taken from the Hugging Face cache
    or pulled into it; None is the embedded demo. device: None is "auto", the best that this machine has. dtype: a torch
    dtype or its name; None keeps the weights as they are stored, and of several dtypes gives all that of most bytes
    (those of a quantized GGUF, dequantized, bfloat16). quantize: "nf4", "fp4", "int8", optimum-quanto's "qint8",
    "qint4", "qint2" or "qfloat8", or a `QuantSpec`: quantize a plain checkpoint, or a GGUF, while it is loaded; one
    that is quantized already runs as it is, without. head: "causal", "none", "sequence" or "token". head_scheme:
    "int8" or "nf4" quantizes the output head too. gpu_memory: the most bytes to take of each CUDA card; what does not
    fit there, or into what is free, stays on the CPU (`model.shares` says what lies where).

    Raises:
        UsageError: an argument that this version or this machine cannot honour.
        InputError: a broken or unsupported checkpoint.
        NotFoundError, NetworkError, ResourceError: there is no such model, or it could not be pulled.

    """
    opened = OpenedModel.open(model)
    try:
        return opened.load(
            device=device, dtype=dtype, quantize=quantize, head=head, head_scheme=head_scheme, gpu_memory=gpu_memory
        )
    except BaseException:
        opened.close()
        raise


def demo_path() -> Path:
    """The folder of the embedded demo model. Raises NotFoundError where this installation lacks it."""
    folder = importlib.resources.files("lmx") / "demo"
    if isinstance(folder, Path) and (folder / "config.json").is_file():
        return folder
    raise NotFoundError("this installation has no embedded demo model", "name a model: lmx chat FOLDER or ORG/NAME")


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint whose files are found, whose headers are checked and whose text process is starting; no weights yet.

    Opening takes no torch, so a command can fail early and the text process loads while torch does.
    """

    name: str
    is_demo: bool
    checkpoint: Checkpoint
    text: TextEngine

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        *,
        revision: str | None = None,
        offline: bool = False,
        watch: Watcher = unwatched,
        chat: bool = False,
    ) -> "OpenedModel":
        """Find a model and open its files. chat: it will be talked to, so prepare its template. Raises as `load`."""
        checkpoint = open_checkpoint(model, revision=revision, offline=offline, watch=watch)
        return cls(model_name(model, revision), model is None, checkpoint, open_text(checkpoint, chat=chat))

    def load(
        self,
        *,
        device: Device | None = None,
        dtype: "torch.dtype | str | None" = None,
        quantize: "str | QuantSpec | None" = None,
        head: "HeadKind" = "causal",
        head_scheme: "HeadScheme | None" = None,
        attention: "Implementation" = "sdpa",
        gpu_memory: int | None = None,
    ) -> "LanguageModel":
        """The model with its weights. Raises UsageError, InputError."""
        from lmx.language_model import LanguageModel

        spec = choose_spec(quantize)
        where, wanted = choose_device(device), choose_dtype(dtype, self.checkpoint)
        budgets = choose_budgets(device, gpu_memory)
        loaded = load_core(self.checkpoint, spec, head, head_scheme, wanted, where, budgets)
        loaded.attention = attention
        return LanguageModel(loaded, self.text, stop_ids=self.stop_ids(loaded.config), defaults=self.generation_config)

    def stop_ids(self, config: "ModelConfig") -> frozenset[int]:
        """The tokens that end an answer, by config, generation config and template together. Raises InputError."""
        return frozenset((*config.eos_ids, *self._generation_eos, *self.text.info.end_of_turn_ids))

    @cached_property
    def generation_config(self) -> Mapping[str, object]:
        """generation_config.json, empty where there is none. Raises InputError."""
        return self.checkpoint.generation_config or {}

    @property
    def _generation_eos(self) -> tuple[int, ...]:
        from lmx.core.config import ConfigReader

        return ConfigReader(self.generation_config, "generation_config.json").token_ids("eos_token_id")

    def close(self) -> None:
        """End the text process."""
        self.text.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_checkpoint(
    model: str | Path | None, *, revision: str | None = None, offline: bool = False, watch: Watcher = unwatched
) -> Checkpoint:
    """Find a model and check its headers. None is the demo. Raises as `load`."""
    folder = find_model(demo_path() if model is None else model, revision=revision, offline=offline, watch=watch)
    checkpoint = open_folder(folder)
    check_runnable(checkpoint)
    return checkpoint


def open_text(checkpoint: Checkpoint, *, chat: bool = False) -> TextEngine:
    """Start the text process of a checkpoint, whose folder stays as long as the process may need it."""
    return TextEngine.open(checkpoint.folder, chat=chat, keep=checkpoint, label=checkpoint.label)


def open_headers(model: str | Path | None, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Find a model to look at, not to run: of one on the hub that is not here, only headers are fetched.

    What is quantized, or not supported, is opened too. Raises as `load`.
    """
    found = find_local(demo_path() if model is None else model, revision=revision)
    if isinstance(found, Path):
        return open_folder(found)
    check_online(found, offline)
    return HeaderCheckpoint.fetch(found)


def open_folder(folder: Path) -> Checkpoint:
    """The weights of a folder: safetensors, or pickles or a GGUF where there are none; or a GGUF itself.

    A folder in a layout of its makers is opened as the hub's would be.

    Raises InputError, NotFoundError.
    """
    gguf = find_gguf(folder) if folder.is_dir() else folder
    if gguf is not None:
        return GGUFCheckpoint.open(gguf)
    original = find_original(folder)
    if original is not None:
        return original
    return PickleCheckpoint.open(folder) if holds_pickles_only(folder) else Checkpoint.open(folder)


def model_name(model: str | Path | None, revision: str | None = None) -> str:
    """What reports call a model: "demo", a hub id with its revision, or a path as given."""
    if model is None:
        return "demo"
    hub_id = HubId.parse(model, revision) if isinstance(model, str) and not Path(model).exists() else None
    return str(hub_id or model)


def load_core(
    checkpoint: Checkpoint,
    spec: "QuantSpec | None",
    head: "HeadKind",
    head_scheme: "HeadScheme | None",
    dtype: "torch.dtype",
    device: "torch.device",
    budgets: "Sequence[Budget]" = (),
) -> "core.LanguageModel":
    """The bare model, with whatever is to be quantized, or is already. Raises UsageError, InputError.

    budgets: what may be taken of each card, in place of `device`.
    """
    if spec is None and head_scheme is None and not checkpoint.is_quantized:
        from lmx.core.loader import load_model

        return load_model(checkpoint, head=head, dtype=dtype, device=device, budgets=budgets)
    from lmx.quant.apply import load_quantized

    return load_quantized(
        checkpoint, spec=spec, head=head, head_scheme=head_scheme, dtype=dtype, device=device, budgets=budgets
    )


def choose_spec(quantize: "str | QuantSpec | None") -> "QuantSpec | None":
    """How to quantize while loading. Raises UsageError for a scheme that there is not."""
    from lmx.quant.spec import SCHEMES, QuantSpec

    if quantize is None or isinstance(quantize, QuantSpec):
        return quantize
    if quantize not in SCHEMES:
        raise UsageError(f"quantize={quantize!r:.40} is unknown", f"give {', '.join(SCHEMES)} or a QuantSpec")
    return QuantSpec(cast("Scheme", quantize))


def check_runnable(checkpoint: Checkpoint) -> None:
    """Raise InputError for an architecture, or weights in a form, that the models here do not compute with."""
    model_type_of(checkpoint.config)
    if checkpoint.quantization_config is not None:
        method = checkpoint.quantization_config.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise InputError(
                f"{quoted(checkpoint.label)} is quantized by {method!s:.40}",
                "take the model it was made from, or one quantized with bitsandbytes",
            )
    if checkpoint.is_quantized:
        return  # what is in it, the loader checks
    for info in checkpoint.infos.values():
        if info.dtype not in RUNNABLE:
            raise InputError(
                f"{quoted(checkpoint.label)}: tensor {quoted(info.name)} is stored as {info.dtype}",
                f"lmx runs weights in {', '.join(RUNNABLE)}",
            )


def import_runtime() -> None:
    """Import torch and what builds on it now, seconds before it is needed."""
    import_module("lmx.core.loader")
    import_module("lmx.language_model")
