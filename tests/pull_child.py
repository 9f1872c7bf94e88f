"""Pull into fresh caches, killed at one step on the disk after another, and then once more in peace.

Run as `python pull_child.py FOLDER MODE STRIDE` with HF_ENDPOINT set; MODE is links, copies or folder. The cache of the
death at step N is FOLDER/N. Prints how many steps a pull has.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants

import lmx
from lmx.convert import fetch, pull, transfer  # noqa: F401 -- so that no child has to

STEPS = ("replace", "symlink", "link", "unlink", "fsync", "ftruncate", "mkdir")


class Mortal:
    """Dies at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call


def pull_in_a_child(folder: Path, mode: str, step: int | None) -> int:
    """The child's wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    constants.HF_HUB_CACHE = str(folder)
    constants.HF_HUB_DISABLE_SYMLINKS = mode == "copies"
    if step is not None:
        mortal = Mortal(step)
        for name in STEPS:
            setattr(os, name, mortal.wrap(getattr(os, name)))
    lmx.pull("org/tiny", local_dir=folder / "model" if mode == "folder" else None)
    os._exit(0)


def main(folder: Path, mode: str, stride: int) -> None:
    step = 1
    while pull_in_a_child(folder / str(step), mode, step) == signal.SIGKILL:
        if pull_in_a_child(folder / str(step), mode, None) != 0:
            raise SystemExit(f"the pull after the death at step {step} failed")
        step += stride
    sys.stdout.write(f"{step}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
