"""A trained model through the banks' kernels: the same logits as through the CPU's."""

import torch
from gpu_paths import needs_interpreter, needs_triton
from support import SHARED, needs_shared

import lmx
from lmx.quant.modules import QuantExpertBank


@needs_triton
@needs_interpreter
@needs_shared
def test_logits_are_the_cpus(monkeypatch):
    monkeypatch.setattr("lmx.core.gpu.table._WARPS_WANTED", 1)
    model = lmx.load(SHARED / "checkpoints" / "mixtral", device="cpu", dtype="float32", quantize="nf4")
    prompts = torch.arange(5, 15)[None], torch.tensor([[5]])  # many tokens, a few
    with torch.no_grad():
        got = [model(input_ids=ids).logits for ids in prompts]
        for bank in model.modules():
            if isinstance(bank, QuantExpertBank):
                assert bank.capturable
                bank._on_device = None
        for ids, answer in zip(prompts, got, strict=True):
            torch.testing.assert_close(answer, model(input_ids=ids).logits, rtol=1e-5, atol=1e-4)
