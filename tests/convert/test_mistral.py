"""Mistral's own files: what they become, that it is the same model, and the way back."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from families import write_family
from original_layouts import config_of, hub_tensors, mistral_params, mistral_tensors, write_mistral
from safetensors.torch import load_file, save_file
from support import SHARED, needs_shared
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lmx.api import open_checkpoint, open_folder
from lmx.conversion import Conversion
from lmx.convert.mistral_target import predict_mistral
from lmx.convert.mistral_target import write_mistral as write_target
from lmx.convert.plain import Options
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import ConflictError, InputError
from lmx.core.loader import load_model

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("mixtral") / "source", "mixtral", torch.float32, sliding_window=None)


def convert(source, target, **options):
    *_, last = Conversion(target, **options).run(open_checkpoint(source), "m")
    return last


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("form", ["safetensors", "pth", "pt"])
def test_there_and_back_is_bit_equal(source, form, tmp_path):
    folder = write_mistral(source, tmp_path / "theirs", form)
    convert(folder, tmp_path / "hub")
    assert_same(hub_tensors(tmp_path / "hub"), hub_tensors(source))
    convert(tmp_path / "hub", tmp_path / "back", to="mistral")
    wanted = mistral_tensors(hub_tensors(source), config_of(source), stacked=False)
    assert_same(load_file(tmp_path / "back" / "consolidated.safetensors"), wanted)
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == mistral_params(config_of(source))


def forward_as_mistral(tensors, params, ids):
    """mistral_inference's forward pass (transformer.py, transformer_layers.py, rope.py, moe.py), in float32."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * tensors[name + ".weight"]

    def rotate(x, turns):  # [tokens, heads, width]: neighbours are the two parts of a complex number
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    width, tokens = params["head_dim"], len(ids)
    frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(tokens).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)
    mask = torch.full((tokens, tokens), -math.inf).triu(1)
    x = tensors["tok_embeddings.weight"][ids]
    for n in range(params["n_layers"]):
        layer = f"layers.{n}."
        h = norm(x, layer + "attention_norm")
        q, k, v = (
            (h @ tensors[f"{layer}attention.w{name}.weight"].T).view(tokens, -1, width) for name in "qkv"
        )  # [tokens, heads, width]
        q, k = rotate(q, turns), rotate(k, turns)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhw,khw->hqk", q, k) / math.sqrt(width) + mask
        mixed = torch.einsum("hqk,khw->qhw", scores.softmax(-1), v).reshape(tokens, -1)
        x = x + mixed @ tensors[layer + "attention.wo.weight"].T
        h = norm(x, layer + "ffn_norm")
        x = x + experts_as_mistral(h, tensors, layer + "feed_forward.", params["moe"]["num_experts_per_tok"])
    return norm(x, "norm") @ tensors["output.weight"].T


def experts_as_mistral(h, tensors, block, chosen):
    weights, experts = torch.topk(h @ tensors[block + "gate.weight"].T, chosen)
    weights = F.softmax(weights, dim=1)
    out = torch.zeros_like(h)
    for token in range(len(h)):
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            w1, w2, w3 = (tensors[f"{block}experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
            out[token] += weight * (w2 @ (F.silu(w1 @ h[token]) * (w3 @ h[token])))
    return out


@torch.no_grad()
def test_it_is_the_model_that_mistral_runs(source, tmp_path):
    """The makers' own mathematics on their files gives the logits of transformers on ours."""
    folder = write_mistral(source, tmp_path / "theirs", "safetensors")
    theirs = forward_as_mistral(
        load_file(folder / "consolidated.safetensors"), json.loads((folder / "params.json").read_text()), IDS[0]
    )
    convert(folder, tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    torch.testing.assert_close(model(IDS[:1]).logits[0], theirs, rtol=1e-4, atol=1e-5)
    original = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(model(IDS).logits, original(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_the_folder_runs_as_it_is(source, form, tmp_path):
    opened = open_folder(write_mistral(source, tmp_path / "theirs", form))
    assert "params.json" in opened.title
    assert opened.home == tmp_path / "theirs"
    ours, theirs = load_model(opened), load_model(Checkpoint.open(source))
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    for name in opened.infos:  # views of the file, but for what had to be moved
        first, second = opened.tensor(name), opened.tensor(name)
        assert (first.data_ptr() == second.data_ptr()) == (not name.endswith(("q_proj.weight", "k_proj.weight"))), name


@needs_shared
def test_its_vocabulary_comes_along(tmp_path):
    data = SHARED / "data"
    source = write_family(tmp_path / "source", "mixtral", vocab_size=32000)
    folder = write_mistral(source, tmp_path / "theirs", "safetensors")
    shutil.copy(data / "mixtral" / "tokenizer.model", folder)
    convert(folder, tmp_path / "hub")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hub" / "tokenizer.json"))
    for case in json.loads((data / "vectors" / "mixtral-v1-sentencepiece.json").read_text()):
        assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["ids"]
    assert tokenizer.encode("Hello").ids[0] == 1
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    convert(tmp_path / "hub", tmp_path / "back", to="mistral")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert not (tmp_path / "back" / "tokenizer.json").exists()


@needs_shared
def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    folder = write_mistral(write_family(tmp_path / "source", "mixtral"), tmp_path / "theirs", "safetensors")
    shutil.copy(SHARED / "data" / "mixtral" / "tokenizer.model", folder)
    with pytest.raises(InputError, match="32,000 tokens, the model 96 embeddings"):
        open_folder(folder)


def test_a_trained_dtype_and_a_prediction(source, tmp_path):
    opened = open_checkpoint(source)
    predicted = predict_mistral(opened, tmp_path / "out", Options(torch.bfloat16))
    last = convert(source, tmp_path / "out", to="mistral", dtype="bf16")
    size = (tmp_path / "out" / "consolidated.safetensors").stat().st_size
    assert predicted.output_bytes == last.output_bytes == size
    assert {t.dtype for t in load_file(tmp_path / "out" / "consolidated.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(ConflictError):
        convert(source, tmp_path / "out", to="mistral")
    convert(source, tmp_path / "out", to="mistral", force=True)


def test_a_stopped_run_goes_on(source, tmp_path, monkeypatch):
    monkeypatch.setattr("lmx.convert.single_file._KEEP_BYTES", 1)
    opened = open_checkpoint(source)
    steps = write_target(opened, tmp_path / "out", Options())
    first = [next(steps).name for _ in range(7)]
    steps.close()
    assert not (tmp_path / "out").exists()
    rest = [step.name for step in write_target(opened, tmp_path / "out", Options()) if hasattr(step, "name")]
    assert not set(first[:-1]) & set(rest)
    assert_same(
        load_file(tmp_path / "out" / "consolidated.safetensors"),
        mistral_tensors(hub_tensors(source), config_of(source), stacked=False),
    )


def test_other_families_have_no_such_files(tmp_path):
    with pytest.raises(InputError, match="is no Mixtral"):
        convert(write_family(tmp_path / "olmoe", "olmoe"), tmp_path / "out", to="mistral")
    assert not (tmp_path / "out").exists()


def test_a_context_and_a_window_survive(tmp_path):
    source = write_family(tmp_path / "s", "mixtral", max_position_embeddings=4096, sliding_window=8, rope_theta=1e4)
    convert(source, tmp_path / "theirs", to="mistral")
    convert(tmp_path / "theirs", tmp_path / "back")
    ours, theirs = (load_model(Checkpoint.open(tmp_path / name)).config for name in ("s", "back"))
    named = {"bos_ids", "eos_ids"}
    assert {k: v for k, v in vars(ours).items() if k not in named} == {
        k: v for k, v in vars(theirs).items() if k not in named
    }


def broken(change):
    def edit(folder):
        path = folder / "params.json"
        params = json.loads(path.read_text())
        change(params)
        path.write_text(json.dumps(params))

    return edit


def drop_tensor(folder):
    tensors = load_file(folder / "consolidated.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "consolidated.safetensors")


def add_tensor(folder):
    tensors = load_file(folder / "consolidated.safetensors")
    save_file(tensors | {"layers.0.attention.wz.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (broken(lambda p: p.pop("moe")), "a dense Mistral is not supported"),
        (broken(lambda p: p.update(n_layers=4000)), "tells of 4000 layers, there are 2"),
        (broken(lambda p: p["moe"].update(num_experts=4096)), "is for 4 experts"),
        (broken(lambda p: p.update(n_heads=3)), "cannot be pairs"),
        (broken(lambda p: p.update(dim=128)), "config.json asks for"),
        (broken(lambda p: p.update(vision_encoder={"hidden_size": 4})), "vision_encoder"),
        (broken(lambda p: p.update(new_feature=True)), "new_feature is unknown"),
        (broken(lambda p: p.update(head_dim="16")), "head_dim must be a whole number"),
        (broken(lambda p: p.update(norm_eps=None)), "norm_eps is missing"),
        (drop_tensor, "lacks model.norm.weight"),
        (add_tensor, "unknown tensor"),
        (lambda folder: (folder / "params.json").write_text("[" * 10**5), "nested too deeply"),
        (lambda folder: (folder / "params.json").write_text("[]"), "not an object"),
        (lambda folder: (folder / "params.json").unlink(), "no params.json"),
        (lambda folder: (folder / "consolidated.safetensors").write_bytes(b"\xff" * 64), "consolidated.safetensors"),
    ],
)
def test_what_is_broken_is_named(edit, message, tmp_path):
    folder = write_mistral(write_family(tmp_path / "source", "mixtral"), tmp_path / "theirs", "safetensors")
    edit(folder)
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hubs_own_files_win(source, tmp_path):
    folder = write_mistral(source, tmp_path / "both", "safetensors")
    shutil.copy(source / "model.safetensors", folder)
    shutil.copy(source / "config.json", folder)
    assert type(open_folder(folder)) is Checkpoint


def peak_of(source, target, to) -> int:
    """The most memory that a conversion takes, in a process of its own."""
    code = "import sys, lmx; from lmx.quant.memory import peak_memory_bytes\n"
    code += (
        "lmx.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], max_shard_bytes=20_000_000); print(peak_memory_bytes())"
    )
    return int(subprocess.check_output([sys.executable, "-c", code, str(source), str(target), to]))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_memory_stays_at_a_few_of_the_largest_tensors(form, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_local_experts": 8, "num_hidden_layers": 6}
    peaks = []
    for name, changes in (("small", {}), ("large", sizes)):
        folder = write_mistral(write_family(tmp_path / name, "mixtral", **changes), tmp_path / f"{name}-theirs", form)
        there = peak_of(folder, tmp_path / f"{name}-hub", "hf")
        peaks.append((there, peak_of(tmp_path / f"{name}-hub", tmp_path / f"{name}-back", "mistral")))
    weights = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    stacked = 8 * 2048 * 512 * 2  # the experts of a layer in one tensor
    assert weights > 16 * stacked
    for small, large in zip(*peaks, strict=True):
        assert large - small < 4 * stacked
