"""Work through a large tensor in pieces that fit the cache, on as many threads as torch may use."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch


def for_chunks(total: int, chunk: int, work: Callable[[int, int], None]) -> None:
    """Call `work(start, stop)` for consecutive pieces of `range(total)`, of `chunk` each but for the last.

    Each piece runs on one thread and different pieces on different ones. torch's own threads would meet after every
    one of the small operations of a piece, which costs more than it gains, and far more on a busy machine.
    Pieces must write to different places. The result does not depend on the number of threads.
    """
    pieces = [(start, min(start + chunk, total)) for start in range(0, total, chunk)]
    threads = min(torch.get_num_threads(), len(pieces))
    if threads < 2:
        for start, stop in pieces:
            work(start, stop)
        return
    # The inference mode is a thread's own, like the number of torch's threads; the latter is also the default of
    # threads that start later, which has to be put back.
    inference, torch_threads = torch.is_inference_mode_enabled(), torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            list(pool.map(lambda piece: _run(work, piece, inference), pieces))
    finally:
        torch.set_num_threads(torch_threads)


def _run(work: Callable[[int, int], None], piece: tuple[int, int], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        work(*piece)
