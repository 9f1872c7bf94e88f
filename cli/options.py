"""Options that several commands share, as dataclasses: a command takes a group as one argument."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from lmx.core.errors import UsageError

if TYPE_CHECKING:
    from lmx.core.sampling import Sampling

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A checkpoint's folder, a GGUF, or a hub id ORG/NAME[@REVISION]. Without it: the demo."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
AnswersOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
RevisionOption = Annotated[str | None, typer.Option(help="A hub model's branch, tag or commit.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads. Without it: as many as torch chooses.")]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class CommonOptions:
    """What every command has. `--debug` is read by the catch point (`lmx.cli.run`)."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


@dataclass(frozen=True)
class RuntimeOptions:
    """How and where a model runs."""

    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to run; auto takes a GPU if there is one.")
    ] = "auto"
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Convert the weights. Without it: as stored; of several dtypes, that of most."),
    ] = None
    threads: ThreadsOption = None
    four_bit: Annotated[bool, typer.Option("--4bit", help="Quantize to 4 bits (NF4) while loading.")] = False
    eight_bit: Annotated[bool, typer.Option("--8bit", help="Quantize to 8 bits while loading.")] = False
    head: Annotated[
        Literal["bf16", "int8", "nf4"],
        typer.Option(help="Quantize the output head; bf16 leaves it as it is."),
    ] = "bf16"
    attention: Annotated[
        Literal["sdpa", "eager", "flash"], typer.Option(help="How to compute attention; flash needs CUDA.")
    ] = "sdpa"
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="The most to take of each GPU, such as 20GB; the rest stays on the CPU. Needs CUDA."
        ),
    ] = None
    offline: OfflineOption = False
    revision: RevisionOption = None

    def __post_init__(self) -> None:
        """Raise UsageError for what cannot be."""
        if self.four_bit and self.eight_bit:
            raise UsageError("--4bit and --8bit exclude each other", "give one of them")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads is {self.threads}", "give 1 or more")

    @property
    def quantize(self) -> str | None:
        """The scheme to quantize with while loading, if any."""
        return "nf4" if self.four_bit else "int8" if self.eight_bit else None

    @property
    def head_scheme(self) -> Literal["int8", "nf4"] | None:
        """The scheme of the output head, if it is to be quantized."""
        return None if self.head == "bf16" else self.head

    @property
    def gpu_memory_bytes(self) -> int | None:
        """`--gpu-memory` in bytes. Raises UsageError."""
        return None if self.gpu_memory is None else parse_size("--gpu-memory", self.gpu_memory)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen and when an answer ends; None leaves what the checkpoint's generation_config.json says."""

    temperature: Annotated[float | None, typer.Option(help="Randomness; 0 always takes the likeliest token.")] = None
    top_k: Annotated[int | None, typer.Option(help="Choose among the K likeliest tokens; 0 among all.")] = None
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest that hold this probability.")] = None
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below this share of the likeliest.")] = None
    repeat_penalty: Annotated[float | None, typer.Option(help="Above 1: tokens so far become less likely.")] = None
    presence_penalty: Annotated[float | None, typer.Option(help="Taken off a token that the answer has.")] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time it has it.")] = None
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="The most tokens to generate.")
    ] = None
    stop: Annotated[
        list[str], typer.Option("--stop", metavar="TEXT", help="End the answer before this text. May be repeated.")
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise UsageError for what cannot be."""
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise UsageError(f"--max-new-tokens is {self.max_new_tokens}", "give 0 or more")
        if not all(self.stop):
            raise UsageError("--stop is empty", "give the text to stop at")

    def over(self, defaults: "Sampling") -> "Sampling":
        """The checkpoint's way of choosing tokens with what was given put over it. Raises UsageError."""
        return defaults.override(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )


def parse_size(option: str, text: str) -> int:
    """`20GB`, `512 MiB` or plain bytes as a number of bytes. Raises UsageError naming `option`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"{option}: {text!r} is no size", "write it like 20GB, 512MiB or a number of bytes")
    nbytes = int(float(match[1]) * _UNITS[match[2]])
    if not nbytes:
        raise UsageError(f"{option} is {text}", "give 1 byte or more")
    return nbytes


def spread_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Make each parameter whose type is one of the groups above appear to Typer as one parameter for each field."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @wraps(command)
    def spread(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{option.name: given.pop(option.name) for option in fields(group)})
        command(**given)

    ordered = sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    spread.__dict__["__signature__"] = inspect.Signature(ordered)
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return spread


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=_default(option), annotation=hints[option.name]
        )
        for option in fields(group)
    ]


def _default(option: "Field[Any]") -> object:
    return option.default if option.default_factory is MISSING else option.default_factory()
