import json
import subprocess
import sys

import torch
from families import CONFIGS

from lmx.core.layers.embedding import empty_embedding

BUILD = """
import json, sys, torch
from lmx.core.loader import build
with torch.device("meta"):
    for config in json.loads(sys.argv[1]):
        build(config)
print("torch._dynamo" in sys.modules)
"""


def test_it_embeds_and_learns():
    embedding = empty_embedding(5, 3, pad_id=2)
    with torch.no_grad():
        embedding.weight.copy_(torch.arange(15.0).view(5, 3))
    assert torch.equal(embedding(torch.tensor([1, 4])), torch.tensor([[3.0, 4, 5], [12, 13, 14]]))
    embedding(torch.tensor([1, 2])).sum().backward()
    assert embedding.weight.grad.sum(1).tolist() == [0, 3, 0, 0, 0]  # the padding's stays


def test_building_a_model_imports_no_compiler():
    configs = [{"model_type": family, **config} for family, config in CONFIGS.items()]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps(configs)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
