"""`lmx eval`: how well a model predicts a text, and how far it is from another one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmx.api import OpenedModel
from lmx.cli.console import may_animate, write_json
from lmx.cli.loading import Loaded, loaded, say_memory
from lmx.cli.options import CommonOptions, JsonOption, ModelArgument, RuntimeOptions, spread_groups
from lmx.cli.pull_progress import pull_watcher
from lmx.cli.rows import write_rows
from lmx.core.errors import UsageError
from lmx.evaluation import Sequences, read_ids, read_windows

if TYPE_CHECKING:
    from lmx.core.evaluate import Evaluation
    from lmx.language_model import LanguageModel

COMPARED = ("kl_divergence", "top1_agreement", "routing_agreement", "state_drift")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("eval", epilog="Example: lmx eval ./mixtral --text book.txt --4bit --against ./mixtral")(
        spread_groups(eval_command)
    )


def eval_command(
    model: ModelArgument = None,
    *,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="The text to predict.")] = None,
    ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: a JSON list of lists of token ids.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window of --text. Without it: 2048, or the model's context."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Another model to compare with; it runs as stored, in the same dtype."),
    ] = None,
    json: JsonOption = False,
    runtime: RuntimeOptions,
    common: CommonOptions,
) -> None:
    """Measure perplexity, or how far one model is from another.

    The other one, of --against, may be that which MODEL was quantized from. A text goes through in windows that do not
    overlap, each with BOS first where the tokenizer has one; the first token is not scored. --4bit, --8bit and --head
    quantize MODEL and never BASE.
    """
    if (text is None) == (ids is None):
        raise UsageError("give either --text or --ids", "lmx eval MODEL --text FILE")
    if ids is not None and context is not None:
        raise UsageError("--context cuts a --text; --ids are whole sequences", "leave --context out")
    sequences = None if ids is None else read_ids(ids)
    with loaded(model, runtime, common) as running, _base(against, running, runtime, common) as base:
        if text is not None:
            sequences = read_windows(text, running.model.tokenizer, context, running.model.context_length)
        result = _evaluate(running.model, sequences or [], base, show=may_animate() and not common.quiet)
    rows = {name: value for name, value in asdict(result).items() if base is not None or name not in COMPARED}
    if json:
        write_json(rows)
    else:
        write_rows([(name.replace("_", " "), _shown(value)) for name, value in rows.items()])


@contextmanager
def _base(
    name: str | None, running: Loaded, runtime: RuntimeOptions, common: CommonOptions
) -> "Iterator[LanguageModel | None]":
    """The model to compare with, in the dtype that the other one runs in."""
    if name is None:
        yield None
        return
    with OpenedModel.open(name, offline=runtime.offline, watch=pull_watcher(common.quiet)) as opened:
        dtype = running.model.decoder.embed.weight.dtype
        say_memory(opened, common, dtype)
        memory = runtime.gpu_memory_bytes
        yield opened.load(device=runtime.device, dtype=dtype, attention=runtime.attention, gpu_memory=memory)


def _evaluate(
    model: "LanguageModel", sequences: Sequences, base: "LanguageModel | None", *, show: bool
) -> "Evaluation":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lmx.core.evaluate import Evaluation, evaluate

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} tokens"))
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=not show
    ) as bar:
        task = bar.add_task("eval", total=sum(map(len, sequences)))
        for step in evaluate(model, sequences, base):
            if isinstance(step, Evaluation):
                return step
            bar.update(task, completed=step.tokens, description=f"{step.nll:.4f} nats a token")
    raise RuntimeError("an evaluation ended without a result")


def _shown(value: float | None) -> str:
    if value is None:
        return "none in this family"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
