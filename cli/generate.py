"""`lmx generate`: continue a text, or token ids, without a chat template."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmx.cli.answers import answer_object, cancel_on_interrupt
from lmx.cli.console import is_terminal, write, write_json
from lmx.cli.loading import Loaded, loaded
from lmx.cli.options import AnswersOption, CommonOptions, ModelArgument, RuntimeOptions, SamplingOptions, spread_groups
from lmx.cli.prompts import Prompt, as_json_line, parse_ids, read_prompts, read_stdin, text_prompt
from lmx.core.answer import Finished, Token
from lmx.core.errors import UsageError

if TYPE_CHECKING:
    import threading

DEFAULT_TOKENS = 256


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("generate", epilog='Example: lmx generate ./mixtral "Once upon a time" -n 64')(
        spread_groups(generate_command)
    )


def generate_command(
    model: ModelArgument = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue. Without it: stdin.")
    ] = None,
    *,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids to continue, instead of a text.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A prompt a line, or in a .jsonl an object a line with prompt or prompt_ids; a result a line.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="How many prompts of --file run at once.")] = 8,
    json: AnswersOption = False,
    sampling: SamplingOptions,
    runtime: RuntimeOptions,
    common: CommonOptions,
) -> None:
    """Continue a text, without a chat template. A lone argument is MODEL, and the prompt then comes from stdin.

    The text is encoded as the tokenizer does it, with BOS where it adds one, and only what is generated is printed.
    """
    prompts = _prompts(prompt, prompt_ids, file)
    with loaded(model, runtime, common) as running:
        if file is None:
            _continue_one(running, prompts[0], sampling, json)
        else:
            _continue_all(running, prompts, batch_size, sampling, json)


def _prompts(prompt: str | None, prompt_ids: str | None, file: Path | None) -> list[Prompt]:
    """What to continue, from the one place that names it. Raises UsageError, InputError."""
    if sum(given is not None for given in (prompt, prompt_ids, file)) > 1:
        raise UsageError("PROMPT, --prompt-ids and --file exclude each other", "give one of them")
    if file is not None:
        return read_prompts(file)
    if prompt_ids is not None:
        return [parse_ids(prompt_ids)]
    if prompt is not None:
        return [text_prompt(prompt, "the prompt")]
    if is_terminal(sys.stdin):
        raise UsageError(
            "there is no prompt", 'give one: lmx generate MODEL "PROMPT", or pipe it into lmx generate MODEL'
        )
    return [text_prompt(read_stdin(), "the prompt from stdin")]


def _ids(running: Loaded, prompt: Prompt) -> list[int]:
    return list(prompt.ids) if prompt.ids is not None else running.model.tokenizer.encode(prompt.text or "")


def _limit(sampling: SamplingOptions) -> int:
    return DEFAULT_TOKENS if sampling.max_new_tokens is None else sampling.max_new_tokens


def _continue_one(running: Loaded, prompt: Prompt, sampling: SamplingOptions, json: bool) -> None:
    """Generate for one prompt: the text as it comes, or the object at the end. Ctrl-C ends it where it is."""
    model, prompt_ids = running.model, _ids(running, prompt)
    with cancel_on_interrupt() as cancel:
        for event in model.generate(
            prompt_ids,
            sampling=sampling.over(model.sampling),
            max_new_tokens=_limit(sampling),
            stop=sampling.stop,
            cancel=cancel,
        ):
            if isinstance(event, Token) and not json:
                write(event.text)
            if isinstance(event, Finished):
                _finish(running, prompt_ids, event, json)
        _leave_if(cancel)


def _finish(running: Loaded, prompt_ids: list[int], finished: Finished, json: bool) -> None:
    if json:
        write_json(answer_object(running.name, prompt_ids, finished))
    else:
        write(finished.tail + "\n")


def _continue_all(
    running: Loaded, prompts: list[Prompt], batch_size: int, sampling: SamplingOptions, json: bool
) -> None:
    """Generate for many prompts in left-padded batches; each result is a line."""
    model, prompt_ids = running.model, [_ids(running, prompt) for prompt in prompts]
    with cancel_on_interrupt() as cancel:
        for result in model.generate_batch(
            prompt_ids,
            batch_size=batch_size,
            sampling=sampling.over(model.sampling),
            max_new_tokens=_limit(sampling),
            stop=sampling.stop,
            cancel=cancel,
        ):
            if json:
                write_json(answer_object(running.name, result.prompt_ids, result.finished))
            else:
                write(as_json_line(result.finished.text) + "\n")
        _leave_if(cancel)


def _leave_if(cancel: "threading.Event") -> None:
    """What there was is printed; the exit code still says that it was interrupted."""
    if cancel.is_set():
        raise KeyboardInterrupt
