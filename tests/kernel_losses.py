"""The losses of the trained checkpoints, quantized while loading: `python kernel_losses.py EVERY` writes them as JSON.

EVERY: of the sequences that a checkpoint brings, take one in so many.
"""

import json
import sys

import torch
from support import SHARED

from lmx.core.checkpoint import Checkpoint
from lmx.core.evaluate import Evaluation, evaluate
from lmx.core.model import LanguageModel
from lmx.core.registry import MODEL_TYPES
from lmx.quant.apply import load_quantized
from lmx.quant.spec import QuantSpec

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def losses(every: int) -> dict[str, float]:
    """Nats a token of each family, scheme and dtype: of prompts as a whole, and of some of them token by token."""
    found = {}
    for family in MODEL_TYPES:
        folder = SHARED / "checkpoints" / family
        ids = json.loads((folder / "expected.json").read_text())["eval_ids"][::every]
        for scheme in ("nf4", "int8"):
            for dtype, torch_dtype in DTYPES.items():
                model = load_quantized(Checkpoint.open(folder), spec=QuantSpec(scheme), dtype=torch_dtype)
                *_, whole = evaluate(model, ids)
                assert isinstance(whole, Evaluation)
                found[f"{family} {scheme} {dtype}"] = whole.nll
                found[f"{family} {scheme} {dtype}, token by token"] = stepwise(model, ids[:4])
    return found


@torch.no_grad()
def stepwise(model: LanguageModel, ids: list[list[int]]) -> float:
    """The loss of as many tokens of each sequence as the shortest has, fed one at a time, all sequences together."""
    length = min(map(len, ids))
    tokens = torch.tensor([sequence[:length] for sequence in ids])
    state, total = model.make_state(len(ids)), 0.0
    for at in range(length - 1):
        logits = model(tokens[:, at : at + 1], state=state).logits[:, -1].float()
        total += torch.nn.functional.cross_entropy(logits, tokens[:, at + 1]).item()
    return total / (length - 1)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(losses(int(sys.argv[1]))))
