"""Runs in a Python that has llama_cpp, which need not be that of the tests: a JSON task on stdin, an answer on stdout.

{"greedy": {"model", "prompts", "count"}} -> the greedy ids of each prompt; {"encode": {"model", "texts"}} -> ids;
{"quantize": {"model", "output", "types"}} -> null, after writing a file of each type, `output` with the type in it.
"""

import json
import sys

import llama_cpp
import numpy as np


def greedy(model: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    llama = llama_cpp.Llama(model, n_ctx=1024, n_batch=1024, n_threads=1, verbose=False)
    return [answer(llama, prompt, count) for prompt in prompts]


def answer(llama: llama_cpp.Llama, prompt: list[int], count: int) -> list[int]:
    llama.reset()
    llama.eval(prompt)
    ids: list[int] = []
    for _ in range(count):
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        ids.append(int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax()))
        llama.eval(ids[-1:])
    return ids


def encode(model: str, texts: list[str]) -> list[list[int]]:
    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    return [llama.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


def quantize(model: str, output: str, types: dict[str, int]) -> None:
    for name, number in types.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.pure = number, 1, True
        if llama_cpp.llama_model_quantize(model.encode(), output.format(name).encode(), params):
            raise SystemExit(f"llama.cpp does not write {name}")


(name, arguments), *_ = json.load(sys.stdin).items()
json.dump({"greedy": greedy, "encode": encode, "quantize": quantize}[name](**arguments), sys.stdout)
