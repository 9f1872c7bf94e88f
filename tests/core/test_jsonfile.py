import json
from pathlib import Path

import pytest
from support import SHARED, needs_shared

from lmx.core.errors import InputError, NotFoundError
from lmx.core.jsonfile import parse_json, read_json


def refused(text: str | bytes) -> str:
    with pytest.raises(InputError) as caught:
        parse_json(text.encode() if isinstance(text, str) else text, "it")
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


@needs_shared
def test_reads_every_published_config_as_the_standard_library_does() -> None:
    paths = [*SHARED.glob("checkpoints/*/*config.json"), *SHARED.glob("data/*/config*.json")]
    assert len(paths) > 15
    for path in paths:
        assert read_json(path) == json.loads(path.read_text())


def test_reads_unicode_escapes_and_whole_surrogate_pairs() -> None:
    assert parse_json(rb'{"a": "\ud83d\ude00 \u00e4", "b": [1, -2.5e3, true, null]}', "it") == {
        "a": "\N{GRINNING FACE} ä",
        "b": [1, -2500.0, True, None],
    }


def test_syntax_errors_name_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1,\n  "b" 2}')
    with pytest.raises(InputError, match=r"config\.json' is not valid JSON: .* \(line 2, column 7\)"):
        read_json(path)


@pytest.mark.parametrize("text", ["", " ", "{", '{"a":}', "{}x", '{"a": 1,}', "\ufeff{}", '{"a": "\x01"}', "{'a': 1}"])
def test_what_is_no_json_is_refused(text: str) -> None:
    assert "is not valid JSON" in refused(text)


@pytest.mark.parametrize("text", ["[]", "1", '"x"', "null", "true", "[{}]"])
def test_only_an_object_is_accepted(text: str) -> None:
    assert "not an object" in refused(text)


def test_duplicate_keys_are_refused_at_any_depth() -> None:
    assert "the key 'b' stands twice" in refused('{"a": [{"b": 1, "c": 2, "b": 1}]}')
    assert "the key 'a' stands twice" in refused('{"a": 1, "\\u0061": 2}')


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    assert "is not acceptable JSON" in refused(f'{{"a": {number}}}')


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\uDFFF": 1}', '{"a": "\\ude00\\ud83d"}'])
def test_half_surrogates_are_refused(text: str) -> None:
    assert "surrogate" in refused(text)


def test_bytes_that_are_no_utf8_are_refused() -> None:
    assert "not UTF-8 text (byte 7)" in refused(b'{"a": "\xff"}')


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused(begin: str, end: str) -> None:
    assert "nested too deeply" in refused('{"a": ' + begin * 100_000 + "1" + end * 100_000 + "}")


def test_a_key_of_megabytes_does_not_fill_the_error() -> None:
    key = "k\x1b" * 1_000_000
    assert len(refused(json.dumps({"a": 1})[:-1] + f", {json.dumps(key)}: 1, {json.dumps(key)}: 2}}")) < 1500


def test_the_limit_counts_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path, limit_bytes=8) == {"a": 1}
    with pytest.raises(InputError, match="8 bytes long; the limit for such a file is 7"):
        read_json(path, limit_bytes=7)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"'.*none\.json' does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "dangling.json").symlink_to(tmp_path / "blob")
    with pytest.raises(NotFoundError, match="link to a file that does not exist"):
        read_json(tmp_path / "dangling.json")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(NotFoundError):
        read_json(tmp_path / "file" / "config.json")
