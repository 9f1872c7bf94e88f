"""Mistral's own files of a Mixtral: `consolidated.*`, `params.json` and sentencepiece's `tokenizer.model`.

Source: https://github.com/mistralai/mistral-inference/blob/main/src/mistral_inference/args.py. Imports no torch.
"""

import re
from pathlib import Path

from lmx.convert.mistral_names import mistral_table
from lmx.convert.original_source import Layout, OriginalCheckpoint, find_parts, size_in, stored_shape
from lmx.convert.pickle_source import PickleCheckpoint
from lmx.convert.vocabularies import make_vocabulary
from lmx.core.checkpoint import CONFIG_LIMIT_BYTES, Checkpoint
from lmx.core.config import ConfigReader
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON, read_json, to_json
from lmx.core.safetensors_file import open_safetensors

PARAMS, SAFETENSORS = "params.json", "consolidated.safetensors"
DEFAULT_THETA = 1e6  # mistral_inference's, where params.json names none
_PICKLES = re.compile(r"consolidated\.\d\d\.pth?")
_EMBEDDING = "tok_embeddings.weight"
_TOKEN_IDS: dict[str, JSON] = {"bos_token_id": 1, "eos_token_id": 2}  # of every vocabulary of theirs
_DOWNLOAD_AGAIN = "the download is incomplete or damaged: download it again"


def recognises(names: set[str]) -> bool:
    """Whether a folder of these files is Mistral's."""
    theirs = SAFETENSORS in names or bool(_pickles(names))
    return theirs and not any(name.startswith(("model", "pytorch_model")) for name in names)


def open_mistral(folder: Path) -> OriginalCheckpoint:
    """Open `consolidated.safetensors`, or else the pickles together.

    Raises InputError for files that are damaged, hostile, do not fit each other, or of a model that is no Mixtral.
    """
    names = {entry.name for entry in folder.iterdir()}
    if PARAMS not in names:
        raise InputError(f"{quoted(str(folder))} has Mistral's weights, but no {PARAMS}", _DOWNLOAD_AGAIN)
    config = _config(folder / PARAMS)
    if SAFETENSORS in names:
        stored, what = Checkpoint(folder, (open_safetensors(folder / SAFETENSORS),)), SAFETENSORS
    else:
        pickles = _pickles(names)
        stored, what = PickleCheckpoint.of_files(folder, [folder / name for name in pickles]), pickles[0]
    vocabulary = make_vocabulary(folder, "mixtral", stored_shape(stored, _EMBEDDING, 2)[0])
    ids = {**_TOKEN_IDS, **vocabulary.token_ids}
    small = {"generation_config.json": to_json(ids), **vocabulary.files}
    _check_experts(stored, config)
    table = mistral_table(*(size_in(config, key) for key in _TABLE_KEYS))
    parts = find_parts(stored, table, size_in(config, "num_hidden_layers"))
    return OriginalCheckpoint(stored, Layout(f"Mistral's own files ({PARAMS}, {what})", config | ids, parts, small))


_TABLE_KEYS = ("num_attention_heads", "num_key_value_heads", "num_local_experts")


def _pickles(names: set[str]) -> list[str]:
    return sorted(name for name in names if _PICKLES.fullmatch(name))


def context_length(hidden_size: int) -> int:
    """The context of a Mixtral whose params.json says none: 65,536 for the 8x22B, 32,768 for the 8x7B."""
    return 65536 if hidden_size == 6144 else 32768


def _config(path: Path) -> dict[str, JSON]:
    """params.json as a config.json."""
    raw = read_json(path, CONFIG_LIMIT_BYTES)
    read = ConfigReader(raw, quoted(str(path)))
    if not read.has("moe"):
        raise read.error("moe", "is missing: a dense Mistral is not supported, Mixtral is")
    read.choice("model_type", "transformer", ("transformer",))
    read.must_be("lora")
    read.must_be("vision_encoder")
    read.must_be("use_biases", False)
    read.ignore("max_batch_size")
    hidden, moe = read.integer("dim"), read.section("moe")
    context = read.integer("max_seq_len", context_length(hidden))
    config: dict[str, JSON] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": read.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": read.integer("hidden_dim"),
        "num_hidden_layers": read.integer("n_layers", most=4096),
        "num_attention_heads": read.integer("n_heads"),
        "num_key_value_heads": read.integer("n_kv_heads"),
        "head_dim": read.integer("head_dim"),
        "hidden_act": "silu",
        "rms_norm_eps": read.number("norm_eps"),
        "max_position_embeddings": read.integer("max_position_embeddings", context),
        "sliding_window": _window(read),
        "num_local_experts": moe.integer("num_experts", most=4096),
        "num_experts_per_tok": moe.integer("num_experts_per_tok", most=4096),
        "tie_word_embeddings": False,
    }
    theta = read.number("rope_theta", DEFAULT_THETA, least=1e-3)
    config |= {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    moe.finish()
    read.finish()
    return config


def _window(read: ConfigReader) -> int | None:
    named = "_sliding_window" if read.has("_sliding_window") else "sliding_window"
    read.ignore("sliding_window", "_sliding_window")
    return read.optional_integer(named)


def _check_experts(stored: Checkpoint, config: dict[str, JSON]) -> None:
    """Raise InputError where params.json tells of more experts than the first router has."""
    routers = (f"layers.0.{block}.gate.weight" for block in ("feed_forward", "block_sparse_moe"))
    name = next((name for name in routers if name in stored.infos), None)
    if name is None:
        raise InputError(f"{quoted(stored.label)} has no router in its first layer", _DOWNLOAD_AGAIN)
    rows = stored_shape(stored, name, 2)[0]
    if rows != config["num_local_experts"]:
        what = f"tensor {quoted(name)} is for {rows} experts, {PARAMS} tells of {config['num_local_experts']}"
        raise InputError(f"{quoted(stored.label)}: {what}", _DOWNLOAD_AGAIN)
