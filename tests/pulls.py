"""What tests of pulling share: a repository with one large file, its hub, and pulls in processes of their own."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import Hub, ask_here, environment, random_bytes, serving_two
from huggingface_hub import constants

from lmx.convert import pull
from lmx.convert.transfer import Patience

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
    """Everything in a cache that is neither a blob with the name of its digest, a link, a ref nor a lock."""
    strange = []
    for path in cache.rglob("*"):
        if path.is_dir() or path.parent.name == "refs" or path.suffix == ".lock":
            continue
        if path.parent.name == "blobs" and len(path.name) in (40, 64):
            continue
        if not path.is_symlink():
            strange.append(str(path.relative_to(cache)))
    return strange
