"""One quantization in a process that a test may kill; started by a fork server, so that it takes milliseconds."""

import sys
from pathlib import Path

import torch
from families import config_of

from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import LmxError
from lmx.core.loader import build
from lmx.quant.quantize import Options, quantize
from lmx.quant.spec import QuantSpec

# What torch imports at the first model on the meta device takes seconds: here once, not in every child.
with torch.device("meta"):
    build(config_of("mixtral"))

SPEC = QuantSpec("nf4", block_size=32, double_quant=True)
SHARD_BYTES = 12_000


def options(force: bool = False) -> Options:
    """Several small shards, one worker: a child must not be a burden."""
    return Options(max_shard_bytes=SHARD_BYTES, workers=1, force=force)


def run(source: Path, target: Path, force: bool = False, file_limit: int | None = None) -> None:
    """Quantize, and exit as the command line would."""
    torch.set_num_threads(1)
    if file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        for _ in quantize(Checkpoint.open(source), target, SPEC, options(force)):
            pass
    except LmxError as error:
        sys.exit(error.exit_code)
