"""OLMoE as OLMo's trainer leaves it after unsharding: `model.pt` and `config.yaml`, perhaps with its tokenizer's file.

The published runs name token 0 as their end, which is not what they were trained with; every converter says 50279.
Source: https://github.com/allenai/OLMoE (configs) and https://github.com/allenai/OLMo/blob/main/olmo/config.py.
Imports no torch.
"""

from pathlib import Path

from lmx.convert.original_names import Change, Row, Table
from lmx.convert.original_source import Layout, OriginalCheckpoint, find_parts, size_in, stored_shape
from lmx.convert.pickle_source import PickleCheckpoint
from lmx.convert.vocabularies import TOKENIZER
from lmx.convert.yaml_file import read_yaml
from lmx.core.checkpoint import Checkpoint
from lmx.core.config import ConfigReader
from lmx.core.errors import InputError
from lmx.core.files import is_plain_name, quoted, read_bounded
from lmx.core.jsonfile import JSON, to_json
from lmx.core.text.files import MAX_TOKENIZER_BYTES

CONFIG, WEIGHTS = "config.yaml", "model.pt"
_BLOCK, _LAYER = "transformer.blocks.{}.", "model.layers.{}."
_TRUE_END = 50279
_ROUTER = "transformer.blocks.0.ffn.router.layer.weight"
_STACKED = "transformer.blocks.0.ffn.experts.mlp.w1"
_MISMATCH = "config.yaml and model.pt belong to different models, or a file is damaged: download both again"

# And OLMo's defaults, as for all that is read here
_MUST_BE_ON = {
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "layer_norm_with_affine": True,
    "rope": False,
}
# What no forward pass of a trained model reads, and what only says how the same is computed
_NO_MATHS = """
    alibi_bias_max attention_dropout block_group_size embedding_dropout emb_init_std flash_attention init_cutoff_factor
    init_device init_fn init_std mlp_hidden_size mlp_ratio moe_capacity_factor moe_dropless
    moe_expert_model_parallelism moe_lbl_in_fp32 moe_log_expert_assignment moe_loss_weight moe_mlp_impl
    moe_zloss_weight precision residual_dropout rope_full_precision scale_emb_init vocab_size
""".split()  # noqa: SIM905


def recognises(names: set[str]) -> bool:
    """Whether a folder of these files is OLMo's."""
    return {CONFIG, WEIGHTS} <= names


def open_olmo(folder: Path) -> Checkpoint:
    """Open the weights. Raises InputError for files that are damaged, hostile, or of a model that is no OLMoE."""
    raw = read_yaml(folder / CONFIG)
    where = quoted(str(folder / CONFIG))
    read = ConfigReader(raw, where).section("model")
    config, ends = _config(read), read.token_ids("eos_token_id")
    read.finish()
    stored = PickleCheckpoint.of_files(folder, [folder / WEIGHTS])
    rows = stored_shape(stored, "transformer.wte.weight", 2)[0]
    heads, kv_heads, experts, layers, hidden = (size_in(config, key) for key in _TABLE_KEYS)
    config |= {"vocab_size": rows, "intermediate_size": _expert_width(stored, experts)}
    shares = (hidden, kv_heads * (hidden // heads), kv_heads * (hidden // heads))
    parts = find_parts(stored, _table(shares, experts), layers)
    ids: dict[str, JSON] = {"eos_token_id": _TRUE_END if ends[0] == 0 and rows > _TRUE_END else ends[0]} if ends else {}
    small = {"generation_config.json": to_json(ids), **_tokenizer(raw, folder)}
    return OriginalCheckpoint(stored, Layout(f"OLMo's files ({WEIGHTS}, {CONFIG})", config | ids, parts, small))


_TABLE_KEYS = ("num_attention_heads", "num_key_value_heads", "num_experts", "num_hidden_layers", "hidden_size")


def _config(read: ConfigReader) -> dict[str, JSON]:
    """The section `model` as a config.json, but for the sizes that the weights tell."""
    if read.choice("block_type", "sequential", ("moe", "sequential")) != "moe":
        raise read.error("block_type", "is not moe: a dense OLMo is not supported, OLMoE is")
    _check_maths(read)
    heads = read.integer("n_heads")
    kv_heads = 1 if read.flag("multi_query_attention", False) else heads
    experts = read.integer("moe_num_experts", most=4096)
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": read.integer("d_model"),
        "num_hidden_layers": read.integer("n_layers", most=4096),
        "num_attention_heads": heads,
        "num_key_value_heads": read.integer("n_kv_heads", kv_heads),
        "max_position_embeddings": read.integer("max_sequence_length"),
        "num_experts": experts,
        "num_experts_per_tok": read.integer("moe_top_k", most=experts),
        "norm_topk_prob": False,
        "clip_qkv": read.optional_number("clip_qkv"),
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": read.number("layer_norm_eps", 1e-5),
        "rope_theta": read.number("rope_theta", 10000.0),
        "pad_token_id": read.optional_integer("pad_token_id", least=0),
        "tie_word_embeddings": read.flag("weight_tying", True),
    }


def _check_maths(read: ConfigReader) -> None:
    """Refuse what the hub's OLMoE does not compute."""
    read.choice("activation_type", "swiglu", ("swiglu",))
    read.choice("layer_norm_type", "default", ("rms",))
    for key, default in _MUST_BE_ON.items():
        if not read.flag(key, default):
            raise read.error(key, "is off, which lmx does not support")
    biased = read.flag("include_bias", True)
    if biased or read.flag("bias_for_layer_norm", biased):
        raise read.error("include_bias", "or bias_for_layer_norm is on, which lmx does not support")
    for key in ("alibi", "embedding_layer_norm", "moe_normalize_expert_weights", "moe_shared_expert", "norm_after"):
        read.must_be(key, False)
    read.must_be("scale_logits", False)
    read.ignore("embedding_size", *_NO_MATHS)


def _expert_width(stored: Checkpoint, experts: int) -> int:
    """The width of an expert; the first router must be for as many experts as config.yaml tells of."""
    routed, rows = stored_shape(stored, _ROUTER, 2)[0], stored_shape(stored, _STACKED, 2)[0]
    if routed != experts or rows % experts:
        what = f"{quoted(_ROUTER)} is for {routed} experts with {rows} rows, {CONFIG} tells of {experts}"
        raise InputError(f"{quoted(stored.label)}: tensor {what}", _MISMATCH)
    return rows // experts


def _tokenizer(raw: dict[str, JSON], folder: Path) -> dict[str, bytes]:
    """The tokenizer's file by the name that config.yaml gives it, where it lies in the folder."""
    section = raw.get("tokenizer")
    identifier = section.get("identifier") if isinstance(section, dict) else None
    name = str(identifier).rpartition("/")[2]
    if (folder / TOKENIZER).exists() or not name.endswith(".json") or not is_plain_name(name):
        return {}
    path = folder / name
    return {TOKENIZER: read_bounded(path, MAX_TOKENIZER_BYTES)} if path.is_file() else {}


def _table(shares: tuple[int, ...], experts: int) -> Table:
    attention, mlp = _LAYER + "self_attn.", _LAYER + "mlp."
    kept = {
        "attn_out": attention + "o_proj",
        "q_norm": attention + "q_norm",
        "k_norm": attention + "k_norm",
        "attn_norm": _LAYER + "input_layernorm",
        "ff_norm": _LAYER + "post_attention_layernorm",
        "ffn.router.layer": mlp + "gate",
    }
    stacked = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
    return Table(
        Row("transformer.wte.weight", ("model.embed_tokens.weight",)),
        Row("transformer.ln_f.weight", ("model.norm.weight",)),
        Row("transformer.ff_out.weight", ("lm_head.weight",)),
        Row(_BLOCK + "att_proj.weight", tuple(f"{attention}{name}_proj.weight" for name in "qkv"), shares=shares),
        *(Row(f"{_BLOCK}{theirs}.weight", (f"{hub}.weight",)) for theirs, hub in kept.items()),
        *(
            Row(
                f"{_BLOCK}ffn.experts.mlp.{theirs}",
                tuple(f"{mlp}experts.{expert}.{hub}.weight" for expert in range(experts)),
                Change.TRANSPOSED if theirs == "w2" else Change.NOTHING,
            )
            for theirs, hub in stacked.items()
        ),
    )
