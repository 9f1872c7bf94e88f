"""RecurrentGemma as google-deepmind publishes it for torch: one `NAME.pt`, and sentencepiece's `tokenizer.model`.

There is no config: shapes tell the sizes, and every published one has the window, the soft cap and the scaled
embeddings of `Preset.RECURRENT_GEMMA_2B_V1` and its 9B twin; a config.json of the hub that lies there wins.
Source: https://github.com/google-deepmind/recurrentgemma/blob/main/recurrentgemma/common.py. Imports no torch.
"""

from pathlib import Path

from lmx.convert.original_names import Change, Row, Table
from lmx.convert.original_source import Layout, OriginalCheckpoint, find_parts, stored_shape
from lmx.convert.pickle_source import PickleCheckpoint
from lmx.convert.vocabularies import make_vocabulary
from lmx.core.checkpoint import CONFIG_LIMIT_BYTES, Checkpoint
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON, read_json, to_json

_EMBEDDING = "embedder.input_embedding"
_BLOCK, _LAYER = "blocks.{}.", "model.layers.{}."
_TOKEN_IDS: dict[str, JSON] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # of Gemma's vocabulary
_GRIFFIN = ["recurrent", "recurrent", "attention"]
_DAMAGED = "the download is incomplete or damaged: download it again"


def recognises(names: set[str]) -> bool:
    """Whether a folder of these files may be theirs: one pickle, and nothing that belongs to another layout."""
    others = (".safetensors", ".bin", ".yaml", ".index.json", "params.json")
    return len(_pickles(names)) == 1 and not any(name.endswith(others) for name in names)


def open_griffin(folder: Path) -> Checkpoint | None:
    """Open the pickle; None where it holds other tensors. Raises InputError for files that are damaged or hostile."""
    (name,) = _pickles({entry.name for entry in folder.iterdir()})
    stored = PickleCheckpoint.of_files(folder, [folder / name])
    if _EMBEDDING not in stored.infos:
        return None
    config = _given_config(folder) or _config(stored)
    rows = stored_shape(stored, _EMBEDDING, 2)[0]
    vocabulary = make_vocabulary(folder, "recurrent_gemma", rows)
    ids = {**_TOKEN_IDS, **vocabulary.token_ids}
    parts = find_parts(stored, _table(), len(_kinds(stored)))
    small = {"generation_config.json": to_json(ids), **vocabulary.files}
    small = {name: data for name, data in small.items() if not (folder / name).exists()}
    return OriginalCheckpoint(stored, Layout(f"RecurrentGemma for torch ({name})", ids | config, parts, small))


def _pickles(names: set[str]) -> list[str]:
    return [name for name in names if name.endswith((".pt", ".pth"))]


def _given_config(folder: Path) -> dict[str, JSON] | None:
    path = folder / "config.json"
    return read_json(path, CONFIG_LIMIT_BYTES) if path.exists() else None


def _config(stored: Checkpoint) -> dict[str, JSON]:
    vocabulary, width = stored_shape(stored, _EMBEDDING, 2)
    kinds = _kinds(stored)
    recurrent, attention = (kinds.index(kind) if kind in kinds else None for kind in ("recurrent", "attention"))
    if recurrent is None:
        raise InputError(f"{quoted(stored.label)} has no recurrent block", _DAMAGED)
    block = f"blocks.{recurrent}.recurrent_block."
    heads, lru_head, _ = stored_shape(stored, block + "rg_lru.a_gate.w", 3)
    head_dim = width // heads
    if attention is not None:
        head_dim = stored_shape(stored, f"blocks.{attention}.attention_block.proj_k.weight", 2)[0]
    is_griffin = kinds == (_GRIFFIN * len(kinds))[: len(kinds)]
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * stored_shape(stored, "blocks.0.mlp_block.ffw_up.w", 3)[2],
        "num_hidden_layers": len(kinds),
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "lru_width": heads * lru_head,
        "conv1d_width": stored_shape(stored, block + "conv_1d.w", 2)[0],
        "_block_types": [*(_GRIFFIN if is_griffin else kinds)],
        "attention_bias": False,
        "attention_window_size": 2048,
        "embeddings_scale_by_sqrt_dim": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "logits_soft_cap": 30.0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }


def _kinds(stored: Checkpoint) -> list[str]:
    """What each block mixes with, "recurrent" or "attention"."""
    kinds: list[str] = []
    while f"blocks.{len(kinds)}.channel_pre_norm.scale" in stored.infos:
        recurrent = f"blocks.{len(kinds)}.recurrent_block.rg_lru.a_param" in stored.infos
        kinds.append("recurrent" if recurrent else "attention")
    return kinds


def _table() -> Table:
    temporal, recurrent, attention = (
        _LAYER + "temporal_block.",
        _BLOCK + "recurrent_block.",
        _BLOCK + "attention_block.",
    )
    mlp, ours = _BLOCK + "mlp_block.", _LAYER + "mlp_block."
    gates = {"input_gate.w": "input_gate_weight", "input_gate.b": "input_gate_bias"}
    gates |= {"a_gate.w": "recurrent_gate_weight", "a_gate.b": "recurrent_gate_bias", "a_param": "recurrent_param"}
    linear = [f"linear_{name}.{kind}" for name in ("x", "y", "out") for kind in ("weight", "bias")]
    return Table(
        Row(_EMBEDDING, ("model.embed_tokens.weight",)),
        Row("final_norm.scale", ("model.final_norm.weight",)),
        *(Row(f"{_BLOCK}{n}_pre_norm.scale", (f"{_LAYER}{n}_pre_norm.weight",)) for n in ("temporal", "channel")),
        *(Row(recurrent + name, (temporal + name,)) for name in linear),
        *(Row(f"{recurrent}rg_lru.{theirs}", (f"{temporal}rg_lru.{hub}",)) for theirs, hub in gates.items()),
        Row(recurrent + "conv_1d.w", (temporal + "conv_1d.weight",), Change.CONVOLUTION),
        Row(recurrent + "conv_1d.b", (temporal + "conv_1d.bias",)),
        *(Row(f"{attention}proj_{name}.weight", (f"{temporal}{name}_proj.weight",)) for name in "qkv"),
        *(Row(f"{attention}proj_final.{kind}", (f"{temporal}o_proj.{kind}",)) for kind in ("weight", "bias")),
        Row(mlp + "ffw_up.w", (ours + "gate_proj.weight", ours + "up_proj.weight"), Change.TRANSPOSED),
        Row(mlp + "ffw_up.b", (ours + "gate_proj.bias", ours + "up_proj.bias"), Change.FLAT),
        *(Row(f"{mlp}ffw_down.{kind}", (f"{ours}down_proj.{kind}",)) for kind in ("weight", "bias")),
    )
