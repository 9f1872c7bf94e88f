"""Time a model's matrix products alone: `python products_runner.py CONFIG.json TOKENS DEVICE`, in lmx's NF4 form.

What a prompt costs at least: each matrix of each layer once, times all tokens of the prompt, and the output matrix
times the last one; nothing between them. Prints one JSON object: `seconds`, the best of some rounds.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lmx.core.ceilings import best_seconds
from lmx.core.model import LanguageModel
from lmx.presets import build_dummy
from lmx.quant.modules import QuantLinear

ROUNDS = 5


def main(config_file: str, tokens: int, device: str) -> None:
    """Build, time, print."""
    model = build_dummy(json.loads(Path(config_file).read_text()), "nf4", device="cuda" if device == "cuda" else "cpu")
    with torch.inference_mode():
        work = _products(model, tokens)
        seconds = best_seconds(lambda: [layer(x) for layer, x in work], model.device, ROUNDS)
    sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")


def _products(model: LanguageModel, tokens: int) -> list[tuple[nn.Module, Tensor]]:
    """Each linear layer with what it is given. Experts are none: this is for models without."""
    embedding = model.decoder.embed.weight
    linears = [layer for layer in model.decoder.modules() if isinstance(layer, nn.Linear | QuantLinear)]
    inputs = {
        width: torch.randn(1, tokens, width, dtype=embedding.dtype, device=embedding.device)
        for width in {layer.in_features for layer in linears}
    }
    head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(embedding, requires_grad=False)
    last = torch.randn(1, 1, embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    return [*((layer, inputs[layer.in_features]) for layer in linears), (head, last)]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
