"""Which files of a repository a run needs, and what the rest would have cost.

A repository often holds its weights several times: safetensors, pickles, the publisher's own layout, other programs'
formats. One copy is taken, the first of these that is there: safetensors in the hub's layout, its pickles, the
publisher's own files.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lmx.convert.listing import RemoteFile
from lmx.core.checkpoint import INDEX, SINGLE
from lmx.core.errors import InputError
from lmx.core.files import is_plain_name, quoted

SECOND_COPY = "another copy of the weights"
WHICH_COPY = "weights of which one must be named, by --include"
NOT_NEEDED = "not needed to run"
NOT_ASKED = "left out by --include or --exclude"

_SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
# Read only where there is no tokenizer.json, or beside the publisher's own weights
_OTHER_TOKENIZERS = ("tokenizer.model*", "*.tiktoken", "vocab.json", "merges.txt", "tekken.json")
# Folders in which tools note what they have downloaded; some repositories hold one that came there by mistake
_BOOKKEEPING = (".cache", ".huggingface")
_OWN_CONFIG = ("params.json", "config.yaml")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf")
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|npz|tflite|mlmodel|pdparams|llamafile)"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index(\.[a-z0-9]+)?\.json",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Files that are not taken, all for one reason."""

    reason: str
    names: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What to take of a repository, and what not."""

    files: tuple[RemoteFile, ...]
    left_out: tuple[LeftOut, ...]


def choose(files: Sequence[RemoteFile], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Choice:
    """Choose what a run needs; with `include`, exactly the files that match one of these globs instead.

    exclude: of what would be taken, leave out these. A glob that ends in `/` means all below that folder.

    Raises:
        InputError: a file that would be taken has a name that is refused here, or the globs leave nothing.

    """
    needed = set(_matching(files, include) if include else _needed([file.name for file in files]))
    chosen = needed - set(_matching(files, exclude))
    if not chosen:
        patterns = ", ".join(map(quoted, (*include, *exclude)))
        why = f"is left by {patterns}" if patterns else "is one that a run needs"
        raise InputError(f"no file of the repository {why}", "see its files on the hub, and name some by --include")
    for name in chosen:
        if not all(map(is_plain_name, name.split("/"))):
            raise InputError(f"{quoted(name)} is a name that not every disk can hold", "leave it out with --exclude")
        if name.split("/")[0].lower() in _BOOKKEEPING:
            raise InputError(f"{quoted(name)} would lie among the notes of a pull", "leave it out with --exclude")
    taken = tuple(sorted((file for file in files if file.name in chosen), key=lambda file: (file.size, file.name)))
    others = [file for file in files if file.name not in chosen]
    other_weights = SECOND_COPY if any(_is_weights(name) for name in needed) else WHICH_COPY

    def reason(file: RemoteFile) -> str:
        if include or file.name in needed:
            return NOT_ASKED
        return other_weights if _is_weights(file.name) else NOT_NEEDED

    return Choice(taken, _grouped(others, reason))


def _needed(names: Sequence[str]) -> set[str]:
    """What a run needs: files beside each other at the top, and of the weights one copy."""
    top = [name for name in names if "/" not in name]
    weights = _one_copy(top)
    is_own = any(name.startswith("consolidated") for name in weights)
    patterns: tuple[str, ...] = _SMALL
    if is_own or "tokenizer.json" not in top:
        patterns += _OTHER_TOKENIZERS
    if is_own or "config.json" not in top:
        patterns += _OWN_CONFIG
    return weights | {name for name in top if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _one_copy(top: Sequence[str]) -> set[str]:
    """The files of one copy of the weights, with its index."""

    def matching(*patterns: str) -> set[str]:
        return {name for name in top if any(fnmatchcase(name, pattern) for pattern in patterns)}

    consolidated = matching("consolidated*")
    shards = {name for name in top if _SHARD.fullmatch(name)}
    candidates = (
        {SINGLE} & set(top),
        shards | ({INDEX} & set(top) if shards else set()),
        (matching("*.safetensors") - consolidated) | ({INDEX} & set(top)),
        matching("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
        matching("consolidated*.safetensors"),
        matching("consolidated*.pth", "consolidated*.pt"),
    )
    for found in candidates:
        if any(not name.endswith(".json") for name in found):
            return found
    # The publisher's own: one file of a kind may be it, or one GGUF in parts; of several nobody knows which
    for suffix in ("pt", "pth", "bin", "gguf"):
        found = matching(f"*.{suffix}") - {"training_args.bin"}
        if found:
            return found if len({_SPLIT_GGUF.sub("", name) for name in found}) == 1 else set()
    return set()


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def _matching(files: Sequence[RemoteFile], patterns: Sequence[str]) -> set[str]:
    globs = [pattern + "*" if pattern.endswith("/") else pattern for pattern in patterns]
    return {file.name for file in files if any(fnmatchcase(file.name, glob) for glob in globs)}


def _grouped(files: Sequence[RemoteFile], reason: Callable[[RemoteFile], str]) -> tuple[LeftOut, ...]:
    groups: dict[str, list[RemoteFile]] = {}
    for file in files:
        groups.setdefault(reason(file), []).append(file)
    return tuple(
        LeftOut(why, tuple(file.name for file in group), sum(file.size for file in group))
        for why, group in groups.items()
    )
