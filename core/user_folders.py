"""Where a user's own files lie: by the XDG base directory specification, on macOS in the place of its own."""

import os
import sys
from pathlib import Path


def data_folder() -> Path:
    """What a user would want to keep: LMX_HOME, else `lmx` in XDG_DATA_HOME.

    Raises RuntimeError where no home is known: HOME is not set, and the system does not know the user.
    """
    return _folder("XDG_DATA_HOME", Path(".local", "share"))


def state_folder() -> Path:
    """What may be lost: LMX_HOME, else `lmx` in XDG_STATE_HOME. Raises RuntimeError as `data_folder` does."""
    return _folder("XDG_STATE_HOME", Path(".local", "state"))


def _folder(variable: str, default: Path) -> Path:
    own, named = os.environ.get("LMX_HOME", ""), os.environ.get(variable, "")
    if os.path.isabs(own):
        return Path(own)
    if os.path.isabs(named):
        return Path(named) / "lmx"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "lmx"
    return Path.home() / default / "lmx"
