"""The makers' own checkpoints of RecurrentGemma, FalconMamba and OLMoE, and DBRX with tiktoken's vocabulary."""

import json
import shutil

import pytest
import torch
from families import write_family
from original_layouts import OLMO_YAML, hub_tensors, write_griffin, write_mamba, write_mistral, write_olmo
from safetensors.torch import save_file
from support import SHARED, needs_shared, run_lmx
from text_folders import byte_level_folder
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lmx.api import open_checkpoint, open_folder
from lmx.conversion import Conversion
from lmx.convert.original_source import OriginalCheckpoint
from lmx.core.checkpoint import Checkpoint
from lmx.core.errors import InputError
from lmx.core.loader import load_model

IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))
WRITERS = {
    "recurrent_gemma": write_griffin,
    "falcon_mamba": write_mamba,
    "olmoe": write_olmo,
    "mixtral": lambda source, folder: write_mistral(source, folder, "pt"),
}
# What the layouts have no word for: theirs are the published models' values
PUBLISHED = {
    "recurrent_gemma": {"attention_window_size": 2048},
    "falcon_mamba": {"tie_word_embeddings": True},
}


def convert(source, target, **options):
    *_, last = Conversion(target, **options).run(open_checkpoint(source), "m")
    return last


@pytest.fixture(scope="module", params=WRITERS)
def pair(request, tmp_path_factory):
    """A checkpoint of the hub, and the same as its makers have it, opened."""
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    dtype = torch.bfloat16 if family in ("olmoe", "falcon_mamba") else torch.float32
    source = write_family(root / "source", family, dtype, **PUBLISHED.get(family, {}))
    return source, open_checkpoint(WRITERS[family](source, root / "theirs"))


@torch.no_grad()
def test_the_hub_form_is_bit_equal_and_runs_in_transformers(pair, tmp_path):
    source, opened = pair
    assert isinstance(opened, OriginalCheckpoint)
    list(Conversion(tmp_path / "hub", max_shard_bytes=100_000).run(opened, "m"))
    before, after = hub_tensors(source), hub_tensors(tmp_path / "hub")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert theirs.dtype == next(iter(before.values())).dtype
    original = AutoModelForCausalLM.from_pretrained(source, dtype=theirs.dtype)
    assert torch.equal(theirs(IDS).logits, original(IDS).logits)


@torch.no_grad()
def test_a_folder_runs_as_it_is(pair):
    ours, theirs = load_model(pair[1]), load_model(Checkpoint.open(pair[0]))
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=2e-2, atol=1e-3)


def test_the_configs_say_the_same(pair):
    ours, theirs = load_model(pair[1]).config, load_model(Checkpoint.open(pair[0])).config
    different = {key for key, value in vars(theirs).items() if vars(ours)[key] != value}
    # ids, which the sources know; the context of one that says none
    assert different <= {"bos_ids", "eos_ids", "pad_id", "max_position_embeddings"}


def test_a_given_config_wins_over_the_presets(tmp_path):
    source = write_family(tmp_path / "source", "recurrent_gemma", attention_window_size=16)
    folder = write_griffin(source, tmp_path / "theirs")
    assert open_folder(folder).config["attention_window_size"] == 2048
    shutil.copy(source / "config.json", folder)
    assert open_folder(folder).config["attention_window_size"] == 16


def test_a_pickle_of_other_tensors_is_no_griffin(tmp_path):
    folder = write_family(tmp_path / "source", "olmoe")
    torch.save(hub_tensors(folder), folder / "weights.pt")
    (folder / "model.safetensors").unlink()
    opened = open_folder(folder)
    assert not isinstance(opened, OriginalCheckpoint)
    assert "model.norm.weight" in opened.infos


def test_a_block_of_neither_kind_is_refused(tmp_path):
    folder = write_griffin(write_family(tmp_path / "source", "recurrent_gemma"), tmp_path / "theirs")
    tensors = torch.load(folder / "2b.pt")
    del tensors["blocks.0.recurrent_block.rg_lru.a_param"]
    torch.save(tensors, folder / "2b.pt")
    with pytest.raises(InputError, match=r"proj_k\.weight' is missing"):
        convert(folder, tmp_path / "out")


def test_a_plain_mamba_is_not_taken_for_a_falcon(tmp_path):
    source = write_family(tmp_path / "source", "falcon_mamba", vocab_size=50280)
    with pytest.raises(InputError, match="plain Mamba"):
        open_folder(write_mamba(source, tmp_path / "plain"))
    said = write_mamba(source, tmp_path / "said", model_type="falcon_mamba", vocab_size=50277)
    opened = open_folder(said)
    assert opened.config["vocab_size"] == 50280
    assert "taken" not in opened.title


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm": False},
        {"attn_layer_idx": [1]},
        {"d_intermediate": 128},
        {"ssm_cfg": {"layer": "Mamba2"}},
        {"ssm_cfg": {"d_state": 16, "headdim": 64}},
        {"n_layer": 3000},
        {"model_type": "mamba"},
    ],
    ids=str,
)
def test_what_no_falcon_mamba_has_is_named(changes, tmp_path):
    folder = write_mamba(write_family(tmp_path / "source", "falcon_mamba"), tmp_path / "theirs", **changes)
    save_file(torch.load(folder / "pytorch_model.bin"), folder / "model.safetensors")
    key = next(iter(changes))
    wanted = {"ssm_cfg": "layer|headdim", "n_layer": "tells of 3000 layers"}.get(key, key)
    with pytest.raises(InputError, match=wanted):
        open_folder(folder)


def test_mambas_own_names_under_a_config_of_the_hub(tmp_path):
    source = write_family(tmp_path / "source", "falcon_mamba", tie_word_embeddings=True)
    folder = write_mamba(source, tmp_path / "theirs")
    shutil.copy(source / "config.json", folder)
    convert(folder, tmp_path / "hub")
    before, after = hub_tensors(source), hub_tensors(tmp_path / "hub")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_mamba_learns_its_last_token_from_its_tokenizer(tmp_path):
    source = write_family(tmp_path / "source", "falcon_mamba", vocab_size=512)
    folder = byte_level_folder(write_mamba(source, tmp_path / "theirs"))
    opened = open_folder(folder)
    assert "taken as a FalconMamba" in opened.title
    assert opened.config["eos_token_id"] == opened.generation_config["eos_token_id"] == 0
    assert (opened.folder / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("block_type: moe", "block_type: sequential", "a dense OLMo"),
        ("moe_num_experts: 4", "moe_num_experts: 8", "is for 4 experts"),
        ("n_layers: 2", "n_layers: 4000", "tells of 4000 layers"),
        ("include_bias: false", "include_bias: true", "include_bias"),
        ("attention_layer_norm: true", "attention_layer_norm: false", "attention_layer_norm is off"),
        ("layer_norm_type: rms", "layer_norm_type: default", "layer_norm_type"),
        ("rope: true", "rope: true\n  norm_after: true", "norm_after"),
        ("rope: true", "rope: true\n  new_feature: 3", "new_feature is unknown"),
        ("d_model: 64", "d_model: sixty-four", "d_model must be a whole number"),
        ("d_model: 64", "d_model: &a 64", "anchors and aliases"),
        ("d_model: 64", "d_model: 128", "does not hold"),
        ("model:", "models:", "block_type"),
    ],
)
def test_what_no_olmoe_has_is_named(old, new, message, tmp_path):
    folder = write_olmo(write_family(tmp_path / "source", "olmoe"), tmp_path / "theirs")
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        open_folder(folder)


def test_olmos_tokenizer_and_its_true_end(tmp_path):
    source = write_family(tmp_path / "source", "olmoe", vocab_size=50304)
    folder = write_olmo(source, tmp_path / "theirs")
    opened = open_folder(folder)
    assert opened.config["eos_token_id"] == 50279
    assert not (opened.folder / "tokenizer.json").exists()
    byte_level_folder(tmp_path / "text")
    name = OLMO_YAML.partition("identifier: tokenizers/")[2].partition("\n")[0]
    shutil.copy(tmp_path / "text" / "tokenizer.json", folder / name)
    convert(folder, tmp_path / "hub")
    assert (tmp_path / "hub" / "tokenizer.json").read_bytes() == (folder / name).read_bytes()


@pytest.fixture
def dbrx(tmp_path):
    folder = write_family(tmp_path / "dbrx", "dbrx", vocab_size=100352)
    shutil.copy(SHARED / "data" / "dbrx" / "cl100k_base.tiktoken", folder)
    return folder


def assert_ids(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for case in json.loads((SHARED / "data" / "vectors" / "dbrx-tiktoken.json").read_text()):
        assert tokenizer.encode(case["text"]).ids == case["ids"]


@needs_shared
@pytest.mark.parametrize("with_config", [True, False])
def test_dbrx_with_tiktokens_vocabulary(dbrx, with_config, tmp_path):
    if with_config:
        shutil.copy(SHARED / "data" / "dbrx" / "tokenizer_config.ASSEMBLED.json", dbrx / "tokenizer_config.json")
    convert(dbrx, tmp_path / "hub")
    assert_ids(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == ("<|endoftext|>", "<|pad|>")
    assert ("chat_template" in config) == with_config


@needs_shared
def test_another_familys_tiktoken_file_is_refused(dbrx):
    (dbrx / "config.json").write_text((dbrx / "config.json").read_text().replace('"dbrx"', '"olmoe"'))
    with pytest.raises(InputError, match="does not say how text is cut"):
        open_folder(dbrx)


@needs_shared
def test_weights_of_the_hub_with_sentencepieces_vocabulary(tmp_path):
    source = write_family(tmp_path / "source", "mixtral", vocab_size=32000)
    shutil.copy(SHARED / "data" / "mixtral" / "tokenizer.model", source)
    opened = open_folder(source)
    assert (opened.title, opened.infos) == (
        "the hub's files with a vocabulary in tokenizer.model",
        Checkpoint.open(source).infos,
    )
    done = run_lmx("generate", str(source), "Hello world", "-n", "0", "--json")
    assert json.loads(done.stdout)["prompt_ids"] == [1, 22557, 1526], done.stderr
    done = run_lmx("chat", str(source), "-p", "hello")
    assert (done.returncode, f"{source} has no chat template" in done.stderr) == (3, True), done.stderr


@needs_shared
def test_the_current_template_goes_with_its_own_layout(tmp_path):
    source = write_family(tmp_path / "source", "mixtral", vocab_size=32000)
    folder = write_mistral(source, tmp_path / "theirs", "safetensors")
    shutil.copy(SHARED / "data" / "mixtral" / "tokenizer.model", folder)
    shutil.copy(SHARED / "data" / "chat" / "mixtral-8x7b-instruct-v0.1.jinja", folder / "chat_template.jinja")
    opened = open_folder(folder)
    made = json.loads((opened.folder / "tokenizer.json").read_text())
    wanted = json.loads((SHARED / "data" / "mixtral" / "tokenizer.metaspace.json").read_text())
    assert (made["pre_tokenizer"], made["normalizer"]) == (wanted["pre_tokenizer"], wanted["normalizer"])
    convert(folder, tmp_path / "hub")
    assert (tmp_path / "hub" / "chat_template.jinja").exists()
