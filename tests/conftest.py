"""Settings for all tests."""

import os

# Small tensors: a second thread only waits at barriers. Children of the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
