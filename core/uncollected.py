"""Work that makes millions of objects which stay: without looking for garbage among them again and again.

torch's modules and a model's tensors are such: the collector finds nothing in them and takes a tenth of the time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Let the garbage collector rest inside; what was made there is never looked at again (gc.freeze).

    Nothing is changed where it rests already. Cycles made inside stay until the program ends.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
