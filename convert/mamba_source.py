"""A FalconMamba as mamba-ssm saves it: `pytorch_model.bin`, and a config.json in that library's words.

Those words do not say whether a model normalises B, C and dt, which is what makes a FalconMamba; a plain Mamba, which
lmx does not run, looks the same. So `"model_type": "falcon_mamba"` in config.json settles it; without, a model with the
vocabulary of the published plain Mambas is refused, and any other one taken as a FalconMamba, which its title says.
Source: https://github.com/state-spaces/mamba/blob/main/mamba_ssm/models/config_mamba.py. Imports no torch.
"""

from pathlib import Path

from lmx.convert.original_names import Row, Table
from lmx.convert.original_source import Layout, OriginalCheckpoint, find_parts, size_in, stored_shape
from lmx.convert.pickle_source import PickleCheckpoint, holds_pickles_only, weight_files
from lmx.convert.vocabularies import read_token_ids
from lmx.core.checkpoint import CONFIG_LIMIT_BYTES, Checkpoint
from lmx.core.config import ConfigReader
from lmx.core.errors import InputError, LmxError
from lmx.core.files import quoted
from lmx.core.jsonfile import JSON, read_json, to_json

_CONFIG = "config.json"
_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"
_PLAIN_VOCABULARIES = range(50277, 50289)  # GPT-NeoX's, padded to some multiple
_TITLE = "mamba-ssm's files (config.json with d_model and n_layer)"
_TAKEN = ", taken as a FalconMamba: they do not say whether B, C and dt are normalised"


def recognises(names: set[str]) -> bool:
    """Whether a folder of these files may be mamba-ssm's; the words of its config decide."""
    return _CONFIG in names


def open_mamba(folder: Path) -> Checkpoint | None:
    """Open the weights; None where config.json is in other words.

    Raises InputError for files that are damaged or hostile, and for a model that is no FalconMamba.
    """
    raw = _raw_config(folder)
    if not {"d_model", "n_layer"} <= raw.keys():
        return None
    if holds_pickles_only(folder):
        stored: Checkpoint = PickleCheckpoint.of_files(folder, weight_files(folder))
    else:
        stored = Checkpoint.open(folder)
    rows = stored_shape(stored, _EMBEDDING, 2)[0]
    config = _config(raw, rows, quoted(str(folder / _CONFIG)))
    parts = find_parts(stored, _table(_repeats_embedding(stored)), size_in(config, "num_hidden_layers"))
    title = _TITLE if "model_type" in raw else _TITLE + _TAKEN
    ids = read_token_ids(folder)
    small = {"generation_config.json": to_json(ids)} if ids and not (folder / "generation_config.json").exists() else {}
    return OriginalCheckpoint(stored, Layout(title, ids | config, parts, small))


def _raw_config(folder: Path) -> dict[str, JSON]:
    """config.json; nothing where it is broken, which whoever opens the folder next will say."""
    try:
        return read_json(folder / _CONFIG, CONFIG_LIMIT_BYTES)
    except LmxError:
        return {}


def _config(raw: dict[str, JSON], rows: int, where: str) -> dict[str, JSON]:
    read = ConfigReader(raw, where)
    read.choice("model_type", "falcon_mamba", ("falcon_mamba",))
    if "model_type" not in raw and rows in _PLAIN_VOCABULARIES:
        raise InputError(
            f"{where} is that of a plain Mamba, which is not supported",
            'if it is a FalconMamba, say so there: "model_type": "falcon_mamba"',
        )
    read.must_be("d_intermediate", 0)
    read.must_be("attn_layer_idx", [])
    read.must_be("rms_norm", True)
    read.ignore("attn_cfg", "fused_add_norm", "vocab_size", "pad_vocab_size_multiple")
    hidden, ssm = read.integer("d_model"), read.section("ssm_cfg")
    ssm.choice("layer", "Mamba1", ("Mamba1",))
    ssm.ignore("use_fast_path")
    expand = ssm.integer("expand", 2)
    config: dict[str, JSON] = {
        "architectures": ["FalconMambaForCausalLM"],
        "model_type": "falcon_mamba",
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": expand * hidden,
        "expand": expand,
        "num_hidden_layers": read.integer("n_layer", most=4096),
        "state_size": ssm.integer("d_state", 16),
        "conv_kernel": ssm.integer("d_conv", 4),
        "time_step_rank": _rank(ssm, raw, -(-hidden // 16)),
        "use_bias": ssm.flag("bias", False),
        "use_conv_bias": ssm.flag("conv_bias", True),
        "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5,
        "mixer_rms_eps": ssm.number("b_c_dt_rms_eps", 1e-6),
        "residual_in_fp32": read.flag("residual_in_fp32", True),
        "tie_word_embeddings": read.flag("tie_embeddings", True),
        **_time_step(ssm),
        **{key: value for key, value in raw.items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    read.ignore("bos_token_id", "eos_token_id", "pad_token_id")
    ssm.finish()
    read.finish()
    return config


def _rank(ssm: ConfigReader, raw: dict[str, JSON], auto: int) -> int:
    given = raw.get("ssm_cfg")
    if isinstance(given, dict) and given.get("dt_rank") == "auto":
        ssm.ignore("dt_rank")
        return auto
    return ssm.integer("dt_rank", auto)


def _time_step(ssm: ConfigReader) -> dict[str, JSON]:
    """How training begins; no forward pass reads it."""
    return {
        "time_step_scale": ssm.number("dt_scale", 1.0),
        "time_step_min": ssm.number("dt_min", 0.001),
        "time_step_max": ssm.number("dt_max", 0.1),
        "time_step_floor": ssm.number("dt_init_floor", 1e-4),
        "time_step_init_scheme": ssm.choice("dt_init", "random", ("random", "constant")),
    }


def _repeats_embedding(stored: Checkpoint) -> bool:
    """Whether the output matrix is the embedding itself under a second name, as torch saves tied ones."""
    head, embedding = stored.infos.get(_HEAD), stored.infos[_EMBEDDING]
    return head is not None and (head.file, head.offset) == (embedding.file, embedding.offset)


def _table(tied: bool) -> Table:
    mixer = [f"{name}.weight" for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")]
    mixer += ["conv1d.bias", "dt_proj.bias", "in_proj.bias", "out_proj.bias", "A_log", "D"]
    kept = [f"backbone.layers.{{}}.mixer.{name}" for name in mixer]
    return Table(
        Row(_EMBEDDING, ("backbone.embeddings.weight",)),
        Row(_HEAD, () if tied else (_HEAD,)),
        *(Row(name, (name,)) for name in (*kept, "backbone.layers.{}.norm.weight", "backbone.norm_f.weight")),
    )
