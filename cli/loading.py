"""From the options to a model that runs, in the order that answers, or fails, soonest."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lmx.api import OpenedModel, import_runtime
from lmx.cli.console import note
from lmx.cli.facts import memory_line, share_line
from lmx.cli.options import CommonOptions, RuntimeOptions
from lmx.cli.pull_progress import pull_watcher
from lmx.core.text.types import Message
from lmx.core.uncollected import uncollected
from lmx.device import Device, choose_budgets, limit_threads

if TYPE_CHECKING:
    import torch

    from lmx.core.placement import Share
    from lmx.core.session_record import Identity
    from lmx.language_model import LanguageModel


@dataclass(frozen=True)
class Loaded:
    """A model with what is known of its files."""

    opened: OpenedModel
    model: "LanguageModel"
    scheme: str
    """How the weights are held, in short."""

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.opened.name

    @cached_property
    def identity(self) -> "Identity":
        """What a saved conversation with this model is tied to."""
        from lmx.identity import identity_of

        return identity_of(self.name, self.opened.checkpoint, self.scheme)


@contextmanager
def loaded(
    model: str | None, runtime: RuntimeOptions, common: CommonOptions, talk: Sequence[Message] | None = None
) -> Iterator[Loaded]:
    """Load a model for the block, and end its text process after it.

    talk: what will be said first. The text process renders it while torch is being imported, so that a template that
    is broken, hostile or refuses the conversation is found before any weight is touched.
    """
    gpu_memory = runtime.gpu_memory_bytes
    opened = OpenedModel.open(
        model,
        revision=runtime.revision,
        offline=runtime.offline,
        watch=pull_watcher(common.quiet),
        chat=talk is not None,
    )
    with opened:
        with uncollected():
            _import_while_rendering(opened, talk)
            limit_threads(runtime.threads)
            if gpu_memory is not None:
                choose_budgets(runtime.device, gpu_memory)  # refuses it before anything is read
            say_memory(opened, common, runtime.device, runtime.dtype, runtime.quantize)
            running = load_as(opened, runtime)
        say_shares(opened.name, running.shares, len(running.decoder.layers), quiet=common.quiet)
        yield Loaded(opened, running, _scheme(opened, running, runtime))


def _scheme(opened: OpenedModel, running: "LanguageModel", runtime: RuntimeOptions) -> str:
    from lmx.identity import scheme_of

    dtype = running.decoder.embed.weight.dtype
    return scheme_of(opened.checkpoint, dtype, runtime.quantize, runtime.head_scheme)


def say_shares(name: str, shares: "Sequence[Share]", layers: int, *, quiet: bool) -> None:
    """What of a model lies on which device, a line each; nothing where no card takes part."""
    for share in shares:
        note(f"{name}: {share_line(share, layers)}", quiet=quiet)


def say_memory(
    opened: OpenedModel,
    common: CommonOptions,
    device: Device,
    dtype: "torch.dtype | str | None",
    quantize: str | None = None,
) -> None:
    """Of a GGUF, whose blocks become numbers in memory, say how much they take. Raises ResourceError for too much."""
    from lmx.memory import check_memory

    needed = check_memory(opened.checkpoint, dtype, quantize, device)
    if needed is not None:
        note(memory_line(opened.name, needed.nbytes, needed.kind), quiet=common.quiet)


def load_as(opened: OpenedModel, runtime: RuntimeOptions) -> "LanguageModel":
    """Load a model as the options say. Raises UsageError, InputError."""
    return opened.load(
        device=runtime.device,
        dtype=runtime.dtype,
        quantize=runtime.quantize,
        head_scheme=runtime.head_scheme,
        attention=runtime.attention,
        gpu_memory=runtime.gpu_memory_bytes,
    )


def _import_while_rendering(opened: OpenedModel, talk: Sequence[Message] | None) -> None:
    if talk is None:
        import_runtime()
        return
    with ThreadPoolExecutor(1) as pool:
        rendered = pool.submit(opened.text.encode_chat, talk)
        import_runtime()
        rendered.result()
