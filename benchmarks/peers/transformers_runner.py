"""Time transformers with bitsandbytes NF4: `python transformers_runner.py CONFIG.json THREADS TESTS [DEVICE]`.

TESTS as `pp512,tg32`; DEVICE: `cpu` or `cuda`. Prints one JSON object, test -> tokens a second. Weights are random and
made in the form that they are run in, on the device. Its best path on a CPU: bf16, inference mode, eval mode
(bitsandbytes then repacks for AVX-512 BF16), a cache kept between steps. What its 4-bit mode leaves alone (3-D experts,
the head) stays in bf16.
"""

import json
import sys
import time
from typing import Any

import bitsandbytes
import torch
import transformers
from bitsandbytes.functional import QuantState, get_4bit_type
from torch import Tensor, nn

BLOCK = 64


def main(config_file: str, threads: int, tests: list[str], device: str) -> None:
    """Build, warm up, run every test once, print."""
    torch.set_num_threads(threads)
    with torch.inference_mode(), torch.device(device):
        model = load(config_file)
        results = {test: _time(model, test[:2], int(test[2:])) for test in tests}
    sys.stdout.write(json.dumps(results) + "\n")


def load(config_file: str) -> Any:
    """A model of the config with random weights, warm, its experts run in the quickest way."""
    with open(config_file, encoding="utf-8") as file:
        raw = json.load(file)
    model = build(transformers.AutoConfig.for_model(raw.pop("model_type"), **raw))
    forward(model, [1, 2, 3], None)
    _choose_experts(model)
    return model


def build(config: Any) -> Any:
    """A model with random weights; every linear layer but the head in NF4, as `load_in_4bit` has it."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        # FalconMamba's loop on a CPU multiplies by dt_proj's weight itself, which must stay a matrix for that.
        if isinstance(module, nn.Linear) and name != "lm_head" and not name.endswith("dt_proj"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _random_linear(module))
    noise = torch.randn(1 << 22, dtype=torch.bfloat16) * 0.02
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].view(parameter.shape)
                values = torch.ones_like(values) if values.ndim == 1 else values
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    _remake_buffers(model, config)
    return model.eval()


def _choose_experts(model: Any) -> None:
    """Let it run experts in the quickest of its own ways, for one token at a time."""
    if "num_experts_per_tok" not in model.config.to_dict():
        return
    speeds = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        _time(model, "tg", 1)
        speeds[name] = _time(model, "tg", 2)
    model.set_experts_implementation(max(speeds, key=lambda name: speeds[name]))


def _random_linear(linear: nn.Linear) -> nn.Module:
    rows, columns = linear.weight.shape
    out = bitsandbytes.nn.Linear4bit(
        columns, rows, linear.bias is not None, torch.bfloat16, quant_type="nf4", device="meta"
    )
    state = QuantState(
        torch.full((rows * columns // BLOCK,), 0.05),
        shape=torch.Size((rows, columns)),
        code=get_4bit_type("nf4", device=torch.get_default_device()),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    packed = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8)
    out.weight = bitsandbytes.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, quant_type="nf4", bnb_quantized=True
    )
    out.weight.module = out
    out.quant_state = state
    return out


def _remake_buffers(model: nn.Module, config: Any) -> None:
    """Rotary tables and scales of one are made when a module is built, which on the meta device makes nothing."""
    for name, module in list(model.named_modules()):
        buffers = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if set(buffers) == {"weight"}:
            module.weight = torch.ones(buffers["weight"].shape, dtype=torch.bfloat16)
        elif buffers:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, type(module)(config))


def _time(model: Any, kind: str, count: int) -> float:
    if kind == "pp":
        ids = list(range(1, count + 1))
        begin = time.perf_counter()
        forward(model, ids, None)
        return count / (time.perf_counter() - begin)
    cache = forward(model, [1, 2, 3], None)
    begin = time.perf_counter()
    for step in range(count):
        cache = forward(model, [step + 1], cache)
    return count / (time.perf_counter() - begin)


def forward(model: Any, ids: list[int], cache: Any) -> Any:
    """Feed some tokens behind a cache, and look for the likeliest next one; returns the cache that holds them too."""
    name = "cache_params" if model.config.model_type == "falcon_mamba" else "past_key_values"
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "use_cache": True, name: cache}
    output = model(**inputs, logits_to_keep=1) if "logits_to_keep" in _arguments(model) else model(**inputs)
    _consume(output.logits)
    return getattr(output, name)


def _arguments(model: Any) -> tuple[str, ...]:
    code = type(model).forward
    return tuple(getattr(code, "__wrapped__", code).__code__.co_varnames)


def _consume(logits: Tensor) -> None:
    logits[:, -1].argmax(-1).item()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), *(sys.argv[4:5] or ["cpu"]))
