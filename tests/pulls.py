"""What tests of pulling share: a repository with one large file, its hub, and pulls in processes of their own."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import Hub, ask_here, environment, random_bytes, serving_two
from huggingface_hub import constants

from lmx.convert import pull
from lmx.convert.patience import Patience

WEIGHTS = "model.safetensors"
SMALL = {"config.json": b'{"model_type": "mixtral"}', "tokenizer.json": b"{}", "README.md": b"---\nlicense: mit\n---\n"}
AT_RISK_BYTES = 16_000_000
"""The most that a death may cost."""


def repository(nbytes: int, seed: int = 0) -> dict[str, bytes]:
    return {**SMALL, WEIGHTS: random_bytes(nbytes, seed)}


@contextmanager
def hub_with(files: dict[str, bytes], cache: Path) -> Iterator[tuple[Hub, Hub]]:
    """A hub and the origin of its large files, asked by huggingface_hub in this process, which has little patience."""
    with pytest.MonkeyPatch.context() as patch, serving_two(files) as (hub, store):
        ask_here(hub, patch, cache)
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        patch.setattr(pull, "PATIENCE", Patience(attempts=4, first_wait=0.01, longest_wait=0.05))
        yield hub, store


def start_pull(hub: Hub, cache: Path, *options: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """`lmx pull org/tiny` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lmx", "pull", "org/tiny", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment(hub, cache), **(env or {})},
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def left_overs(cache: Path) -> list[str]:
    """Everything in a cache that is neither a blob with the name of its digest, a file of a snapshot, a ref nor a lock.

    Where files are copied, a snapshot holds no links.
    """
    paths = [path.relative_to(cache) for path in cache.rglob("*") if not path.is_dir()]
    return [str(path) for path in paths if path.name.startswith(".") or not _has_its_place(path)]


def _has_its_place(path: Path) -> bool:
    if path.parts[0] == ".locks":
        return path.suffix == ".lock" and len(path.stem) in (40, 64)
    if path.parts[1] == "blobs":
        return len(path.name) in (40, 64)
    return path.parts[1] in ("snapshots", "refs")


@contextmanager
def readable_to_all() -> Iterator[Path]:
    """A temporary folder that other users can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        cache = Path(folder) / "cache"
        cache.mkdir()
        yield cache


@contextmanager
def as_nobody() -> Iterator[None]:
    """root may read and write anywhere: be somebody else for the block."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def numbered(pattern: str, count: int) -> Iterable[str]:
    return (pattern.format(number, count) for number in range(1, count + 1))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
# mistralai/Mixtral-8x7B-Instruct-v0.1 and mistralai/Mixtral-8x7B-v0.1, joined: every form that the weights had there
MIXTRAL = [
    *(".gitattributes", "README.md", "config.json", "generation_config.json", "LICENSE", "params.json"),
    *TOKENIZER,
    *(f"consolidated.{number:02}.pt" for number in range(8)),
    *numbered("model-{:05}-of-{:05}.safetensors", 19),
    "model.safetensors.index.json",
    *numbered("pytorch_model-{:05}-of-{:05}.bin", 19),
    "pytorch_model.bin.index.json",
    "original/model.safetensors",
]
