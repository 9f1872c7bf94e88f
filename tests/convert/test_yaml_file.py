"""YAML that somebody else wrote: what it means as PyYAML's safe loader says, and nothing that could cost anything."""

import time

import pytest
import yaml
from original_layouts import OLMO_YAML

from lmx.convert.yaml_file import LIMIT_BYTES, read_yaml
from lmx.core.errors import InputError


def read(folder, text):
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


def test_a_config_means_what_pyyaml_says(tmp_path):
    sizes = dict.fromkeys(
        (
            *("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
            *("vocab_size", "num_experts", "num_experts_per_tok"),
        ),
        7,
    )
    text = OLMO_YAML.format_map(sizes)
    assert read(tmp_path, text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("007", 7),
        ("1e-5", 1e-5),
        ("1.0e-05", 1e-5),
        (".5", 0.5),
        ("5.", 5.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ('"true"', "true"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("2ep", "2ep"),
        ("${oc.env:HOME}", "${oc.env:HOME}"),
        ("[1, a, {b: c}]", [1, "a", {"b": "c"}]),
        ("|\n  1\n  2", "1\n2"),
    ],
)
def test_scalars(text, value, tmp_path):
    assert read(tmp_path, f"key: {text}") == {"key": value}


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no mapping"),
        ("- 1\n- 2", "no mapping"),
        ("just text", "no mapping"),
        (BOMB, "anchors and aliases"),
        ("a: &x 1\nb: *x", "anchors and aliases"),
        ("a: *nothing", "anchors and aliases"),
        ("a: {<<: *b}", "anchors and aliases"),
        ("a: [" + "[" * 5000, "nested too deeply|not valid"),
        ("a: " + "{b: " * 5000, "nested too deeply|not valid"),
        ("a: 1\na: 2", "a key stands twice"),
        ("? [1, 2]\n: 3", "a key is no text"),
        ("a: 1\n---\nb: 2", "not valid"),
        ("a: [1, 2", "not valid"),
        ("\ta: 1", "not valid"),
        (b"a: \xff\xfe", "not valid"),
        (b"a: \x00", "not valid"),
        ("a: " + "x" * LIMIT_BYTES, "limit"),
    ],
)
def test_what_is_refused(text, message, tmp_path):
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert "config.yaml" in caught.value.message
    assert caught.value.message.isprintable()
    assert time.monotonic() - started < 5


def test_tags_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    for tag in (f"!!python/object/apply:os.system ['touch {canary}']", f"!!python/name:os.system {canary}"):
        read(tmp_path, f"a: {tag}")
    assert not canary.exists()


@pytest.mark.parametrize("text", ["1:" * 60000 + "1", "9" * 120000, "a " * 60000, "1" + "0" * 100000 + "e9"])
def test_no_scalar_costs_more_than_its_length(text, tmp_path):
    started = time.process_time()
    assert read(tmp_path, f"a: '{text}'") == {"a": text}
    try:
        assert isinstance(read(tmp_path, f"a: {text}")["a"], str)
    except InputError:
        assert ":" in text
    assert time.process_time() - started < 5
