"""One conversion in a process that a test may kill; started by a fork server, so that it takes milliseconds."""

import resource
import sys
from pathlib import Path

import torch
from families import config_of

from lmx.conversion import Conversion, Format
from lmx.convert import single_file
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import LmxError
from lmx.core.loader import build

# What torch imports at the first model on the meta device takes seconds: here once, not in every child.
with torch.device("meta"):
    build(config_of("mixtral"))

SHARD_BYTES = 12_000


def finish(source: Path, target: Path) -> int:
    """Convert to the end; returns how many tensors were written."""
    single_file._KEEP_BYTES = SHARD_BYTES
    to: Format | None = "mistral" if target.name == "mistral" else None
    job = Conversion(target, to, max_shard_bytes=SHARD_BYTES)
    return len([event for event in job.run(Checkpoint.open(source), "m") if getattr(event, "name", "")])


def run(source: Path, target: Path, file_limit: int | None = None) -> None:
    """Convert, and exit as the command line would."""
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        finish(source, target)
    except LmxError as error:
        sys.exit(error.exit_code)
