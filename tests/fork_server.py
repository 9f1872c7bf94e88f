"""A server that forks child processes of tests with everything imported, so that each starts in milliseconds."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

import pytest


def start_server(module: str) -> ForkServerContext:
    """Begin it, without threads; `module` is what the children run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    with pytest.MonkeyPatch.context() as patch:  # the server imports before it is told our path
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context
