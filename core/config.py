"""Reading `config.json`: every key is taken, knowingly ignored, or refused by name.

A key that we do not know could change the maths, so it is an error; a model that loads is a model that we run right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmx.core.errors import InputError

# What transformers writes into every config and what no forward pass reads: generation defaults of old releases,
# bookkeeping, and switches of the training framework.
_NO_MATHS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation _name_or_path
    add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder
    is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty max_length max_new_tokens min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores prefix problem_type pruned_heads quantization_config
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)

_LARGEST = 2**31 - 1

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class ConfigReader:
    """Takes typed, bounded values out of a config and, at the end, refuses what nobody took."""

    def __init__(self, raw: Mapping[str, object], where: str = "config.json") -> None:
        self._raw = raw
        self._where = where
        self._taken: set[str] = set()

    def _take(self, key: str) -> object:
        self._taken.add(key)
        return self._raw.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self._raw.get(key) is not None

    def error(self, key: str, what: str) -> InputError:
        """The error for a value that cannot be honoured."""
        return InputError(
            f"{self._where}: {key} {what}", "Check the file against the published one; lmx does not guess at a model."
        )

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST) -> int:
        """A whole number within bounds; without a default the key must be there."""
        value = self._take(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(key, f"must be a whole number from {least} to {most}, not {value!r:.80}")
        return value

    def optional_integer(self, key: str, *, least: int = 1, most: int = _LARGEST) -> int | None:
        """A whole number, or None where the key is absent or null."""
        if not self.has(key):
            self._taken.add(key)
            return None
        return self.integer(key, least=least, most=most)

    def number(self, key: str, default: float | None = None, *, least: float = 0.0, most: float = 1e30) -> float:
        """A finite number within bounds; without a default the key must be there."""
        value = self._take(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(key, f"must be a number from {least} to {most}, not {value!r:.80}")
        return float(value)

    def optional_number(self, key: str, *, least: float = 0.0, absent: float | None = None) -> float | None:
        """A finite number, or None where the key is null; `absent` where it is not there."""
        if not self.has(key):
            self._taken.add(key)
            return None if key in self._raw else absent
        return self.number(key, least=least)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r:.80}")
        return value

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of a few names; another one is refused with the list of those that work."""
        value = self._take(key)
        if value is None:
            return default
        if value not in allowed:
            raise self.error(key, f"is {value!r:.80}; supported: {', '.join(allowed)}")
        return str(value)

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of names, or None where the key is absent."""
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.error(key, "must be a list of names")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self._take(key)
        given: list[object] = value if isinstance(value, list) else [] if value is None else [value]
        ids = [i for i in given if isinstance(i, int) and not isinstance(i, bool) and -1 <= i <= _LARGEST]
        if len(ids) != len(given):
            raise self.error(key, f"must be a token id or a list of them, not {value!r:.80}")
        return tuple(i for i in ids if i >= 0)

    def section(self, key: str) -> "ConfigReader":
        """A nested object, read by the same rules; an absent one reads as empty."""
        value = self._take(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return ConfigReader(value, f"{self._where}: {key}")

    def pad_id(self, vocab_size: int) -> int | None:
        """The padding token, which must have an embedding; None where there is none (absent, null or -1)."""
        if self._raw.get("pad_token_id") == -1:
            self._taken.add("pad_token_id")
            return None
        return self.optional_integer("pad_token_id", least=0, most=vocab_size - 1)

    def problem_type(self) -> str | None:
        """What a sequence classifier's labels are; None where their dtype says it."""
        return self.choice("problem_type", "", PROBLEM_TYPES) or None

    def check_heads(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """Refuse heads that cannot share keys evenly, or whose channels cannot turn in pairs."""
        if heads % kv_heads:
            raise self.error("num_key_value_heads", f"({kv_heads}) does not divide {heads} heads")
        if head_dim < 2 or head_dim % 2:
            raise self.error("head_dim", f"({head_dim}) must be even: rotary embedding turns channels in pairs")

    def must_be(self, key: str, *harmless: object) -> None:
        """Refuse by name a feature that we do not have, unless the value says that it is off."""
        value = self._take(key)
        if value is not None and value not in harmless:
            raise self.error(key, f"is {value!r:.80}, which lmx does not support")

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing in the forward pass of this family."""
        self._taken.update(keys)

    def finish(self) -> None:
        """Refuse every key that was neither taken nor is known to be harmless."""
        unknown = sorted(key for key in self._raw if key not in self._taken and key not in _NO_MATHS)
        if unknown:
            raise self.error(unknown[0], "is unknown, and could change what the model computes")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `theta` is the base, `fraction` the share of a head's width that turns."""

    theta: float
    fraction: float = 1.0

    @classmethod
    def read(cls, config: ConfigReader, default_theta: float, default_fraction: float | None = None) -> "RopeConfig":
        """Both spellings: `rope_parameters` (transformers 5) wins over `rope_theta` and `rope_scaling` (4).

        default_fraction: None for a family whose heads always turn whole.
        Raises InputError for a scaling other than `default` (none of the published models has one), and for a
        `partial_rotary_factor` in a family that has none.
        """
        least = 1.0 if default_fraction is None else 0.0
        default_fraction = 1.0 if default_fraction is None else default_fraction
        theta = config.number("rope_theta", default_theta, least=1e-3)
        fraction = config.number("partial_rotary_factor", default_fraction, least=least, most=1.0)
        for key in ("rope_scaling", "rope_parameters"):
            inner = config.section(key)
            inner.choice("rope_type", "default", ("default",))
            inner.choice("type", "default", ("default",))
            theta = inner.number("rope_theta", theta, least=1e-3)
            fraction = inner.number("partial_rotary_factor", fraction, least=least, most=1.0)
            inner.finish()
        return cls(theta, fraction)


@dataclass(frozen=True)
class ModelConfig:
    """What every family has; each family's own config extends it."""

    vocab_size: int
    hidden_size: int
    layers: int
    initializer_range: float
    tie_word_embeddings: bool
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    pad_id: int | None
    labels: int = field(default=2, kw_only=True)
    problem_type: str | None = field(default=None, kw_only=True)
    classifier_dropout: float = field(default=0.1, kw_only=True)
    output_router_logits: bool = field(default=False, kw_only=True)

    @property
    def context_length(self) -> int | None:
        """The number of tokens the model was made for; None where the architecture has no such limit."""
        return None

    @property
    def logits_soft_cap(self) -> float | None:
        """Logits are squashed to (-cap, cap) by tanh where a family does so."""
        return None

    @property
    def experts_to_choose(self) -> int:
        """How many experts a token is sent to; 0 in a family without experts."""
        return 0

    @property
    def attention_width(self) -> int:
        """Channels of all query heads of an attention layer together; 0 in a family without such layers."""
        return 0

    @property
    def router_aux_loss_coef(self) -> float:
        """The weight of the router's load balancing loss beside the language modelling loss."""
        return 0.0


def count_labels(raw: Mapping[str, object]) -> int:
    """The number of classes for the classification heads: `num_labels`, else the size of `id2label`, else 2."""
    number, names = raw.get("num_labels"), raw.get("id2label")
    if isinstance(number, int) and 1 <= number <= _LARGEST:
        return number
    return len(names) if isinstance(names, dict) and names else 2
