"""When Triton's kernels are asked, and that nothing imports Triton before."""

import subprocess
import sys

import pytest
import torch

from lmx.core.gpu import launch
from lmx.core.gpu.launch import can_launch, cuda_path, interpreted, why_not

CPU_ANSWER = """
import sys
import lmx
model = lmx.load(device="cpu", quantize="nf4")
assert len(list(model.generate("How", max_new_tokens=2))) >= 2
assert any(name.startswith("lmx.core.gpu") for name in sys.modules)
assert "triton" not in sys.modules, "something imported Triton"
"""


def test_an_answer_on_the_cpu_imports_no_triton():
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", CPU_ANSWER], capture_output=True, text=True, timeout=60, env=env)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
def test_tensors_elsewhere_are_torchs():
    assert not can_launch(torch.zeros(1))
    assert not can_launch(torch.zeros(1, device="meta"))


@pytest.fixture
def card(monkeypatch):
    """A card of compute capability 9.0 as far as questions go, and no memory of those asked before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "_installed", lambda: True)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    why_not.cache_clear()
    yield torch.device("cuda", 0)
    why_not.cache_clear()


class Trial:
    """In the place of `lmx.core.gpu.trial`."""

    def __init__(self, error):
        self._error = error

    def launch(self, device):
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, None),
        (RuntimeError("Failed to find C compiler.\nmore"), "here: Failed to find C compiler."),
        (subprocess.CalledProcessError(1, "gcc"), "Command 'gcc' returned"),
        (ImportError("libcuda"), "here: libcuda"),
    ],
    ids=["none", "no compiler", "no headers", "no driver"],
)
def test_what_a_first_launch_says(card, monkeypatch, error, said):
    monkeypatch.setattr(launch, "import_module", lambda name: Trial(error))
    obstacle = why_not(card)
    assert (obstacle is None) if said is None else said in obstacle
    assert cuda_path() == ("triton" if said is None else f"torch ({obstacle})")
    assert "\n" not in cuda_path()


def test_reasons_that_need_no_launch(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in why_not(card)
    why_not.cache_clear()
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    assert "TRITON_INTERPRET" in why_not(card)
    why_not.cache_clear()
    monkeypatch.setattr(launch, "_installed", lambda: False)
    assert "gpu" in why_not(card)


def test_without_a_card_there_is_no_path(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_path() is None
