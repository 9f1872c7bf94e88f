"""Settings for all tests."""

import os
import signal

# Small tensors: a second thread only waits at barriers. Children of the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# A shell without job control has what it runs in the background ignore Ctrl-C, and children inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
