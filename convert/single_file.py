"""Writing one large file, a tensor at a time, so that a kill costs no more than the last gigabyte of it."""

from collections.abc import Callable, Iterator, Sequence

from lmx.convert.events import Progress
from lmx.core.output import OutputFolder
from lmx.core.shards import Shard, ShardWriter

_KEEP_BYTES = 1 << 30  # so much at most is made again after a kill


def write_slots(
    output: OutputFolder, shard: Shard, parameters: Sequence[int], write: Callable[[ShardWriter, int], None]
) -> Iterator[Progress]:
    """Call `write(file, number)` for each slot that an earlier run has not completed; yields a Progress after each.

    parameters: of each slot.
    """
    total = sum(parameters)
    with output.shard(shard, {}) as file:
        done, unkept = sum(parameters[: file.done]), 0
        for number in range(file.done, len(shard.slots)):
            slot = shard.slots[number]
            write(file, number)
            done, unkept = done + parameters[number], unkept + slot.nbytes
            if unkept >= _KEEP_BYTES:
                output.keep(file, number + 1)
                unkept = 0
            yield Progress(slot.name, done, total)
