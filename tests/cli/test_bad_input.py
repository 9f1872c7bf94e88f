"""Bad input ends with one clear line, a hint and the contract's exit code, soon, and without a traceback."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import write_family
from support import run_lmx

MODES = (("chat", "-p", "Hello"), ("generate", "Hello"))


def _drop_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _truncate_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _claim_10_gb(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(struct.pack("<Q", 10 * 10**9) + shard.read_bytes()[8:])


def _name_passwd(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../../etc/passwd"
    path.write_text(json.dumps(index))


def _config(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def _template(source: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(source) and None


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _garbage(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("{") and None


FOR_ALL = {
    "missing shard": (_drop_shard, "is missing"),
    "truncated shard": (_truncate_shard, "model-0000"),
    "header of 10 GB": (_claim_10_gb, "10,000,000,000"),
    "index to passwd": (_name_passwd, "'../../etc/passwd'"),
    "unknown model_type": (_config("model_type", "llama"), "'llama'"),
    "unknown key": (_config("logit_magic", 3), "logit_magic"),
    "quantized": (_config("quantization_config", {"quant_method": "gptq"}), "gptq"),
    "no config": (_remove("config.json"), "config.json"),
    "no tokenizer": (_remove("tokenizer.json"), "tokenizer.json"),
    "broken config": (_garbage("config.json"), "config.json"),
    "broken tokenizer": (_garbage("tokenizer.json"), "tokenizer"),
}
FOR_CHAT = {
    "template that reaches out": (_template("{{ ''.__class__.__mro__ }}"), "template"),
    "template that refuses": (_template("{{ raise_exception('never\x1b[31m') }}"), "never"),
    "malformed template": (_template("{% if"), "template"),
    "no template": (_remove("chat_template.jinja"), "template"),
}
CASES = [(name, mode) for name in FOR_ALL for mode in MODES] + [(name, MODES[0]) for name in FOR_CHAT]


@pytest.mark.parametrize(("name", "mode"), CASES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_bad_checkpoint_is_refused(
    lmx: Any, checkpoint: Path, tmp_path: Path, name: str, mode: tuple[str, ...]
) -> None:
    spoil, named = (FOR_ALL | FOR_CHAT)[name]
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    spoil(folder)
    ran = lmx(mode[0], folder, *mode[1:])
    assert ran.code == 3
    _check_error(ran.out, ran.err, named)


def _check_error(out: str, err: str, named: str) -> None:
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("lmx: error: ")
    assert named in first
    assert second.startswith("lmx: hint: ")
    assert "Traceback" not in err
    assert err.replace("\n", "").isprintable()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_an_endless_template_ends_soon_in_a_process_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(ENDLESS)
    start = time.monotonic()
    ran = run_lmx("chat", str(folder), "-p", "Hello")
    seconds = time.monotonic() - start
    assert ran.returncode == 3
    _check_error(ran.stdout, ran.stderr, "too long")
    # 5 seconds are those of an idle machine: how long an ordinary run takes says how idle this one is
    start = time.monotonic()
    run_lmx("generate", str(folder), "--prompt-ids", "1", "-n", "0")
    assert seconds < max(5, 2.5 + 1.5 * (time.monotonic() - start))


def test_a_template_that_repeats_for_ever_is_not_started_again_and_again(
    lmx: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """With torch here already: the time is that of the template alone."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(ENDLESS)
    start = time.monotonic()
    assert lmx("chat", folder, "-p", "Hello").code == 3
    assert time.monotonic() - start < 5


PROMPTS = [
    (("generate", ""), 3, "the prompt is empty"),
    (("chat", "-p", ""), 3, "--prompt is empty"),
    (("generate", "a b c d " * 3000), 3, "tokens long"),
    (("chat", "-p", "a b c d " * 3000), 3, "tokens long"),
    (("generate", "--prompt-ids", "1,600"), 3, "600"),
    (("generate", "--prompt-ids", "1,x"), 2, "--prompt-ids"),
    (("generate", "--prompt-ids", ""), 2, "--prompt-ids"),
    (("generate", "--prompt-ids", "1", "text"), 2, "exclude"),
    (("generate", "--file", "absent.txt"), 4, "absent.txt"),
    (("chat", "--messages", "absent.json"), 4, "absent.json"),
    (("chat", "-p", "x", "--system-file", "absent.txt"), 4, "absent.txt"),
]


@pytest.mark.parametrize(("args", "code", "named"), PROMPTS, ids=lambda value: str(value)[:40])
def test_a_bad_prompt_is_refused(lmx: Any, checkpoint: Path, args: tuple[str, ...], code: int, named: str) -> None:
    command, *rest = args
    ran = lmx(command, checkpoint, *rest)
    assert ran.code == code
    _check_error(ran.out, ran.err, named)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_empty_stdin_is_refused(lmx: Any, checkpoint: Path, command: str) -> None:
    ran = lmx(command, checkpoint, stdin="\n")
    assert ran.code == 3
    _check_error(ran.out, ran.err, "stdin is empty")


FILES = [
    ("p.txt", b"one\n\ntwo\n", "line 2"),
    ("p.txt", b"", "line 1"),
    ("p.txt", b"\xff\xfe", "UTF-8"),
    ("p.jsonl", b'{"prompt": "x"}\n{"text": "x"}\n', "line 2"),
    ("p.jsonl", b'{"prompt_ids": [1, -2]}\n', "line 1"),
    ("p.jsonl", b'{"prompt_ids": []}\n', "line 1"),
    ("p.jsonl", b"[1]\n", "line 1"),
]


@pytest.mark.parametrize(("name", "data", "named"), FILES)
def test_a_bad_file_of_prompts_is_refused(
    lmx: Any, checkpoint: Path, tmp_path: Path, name: str, data: bytes, named: str
) -> None:
    (tmp_path / name).write_bytes(data)
    ran = lmx("generate", checkpoint, "--file", tmp_path / name)
    assert ran.code == 3
    _check_error(ran.out, ran.err, named)


MESSAGES = [
    ("{}", "list"),
    ("[]", "list"),
    ("[1]", "message 1"),
    ('[{"role": "user"}]', "message 1"),
    ('[{"role": "user", "content": 3}]', "message 1"),
    ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', "not the user's"),
    ('[{"role": "robot", "content": "a"}, {"role": "user", "content": "b"}]', "role"),
    ("[", "JSON"),
    ('[]},{"a":[1]', "JSON"),
]


@pytest.mark.parametrize(("text", "named"), MESSAGES)
def test_bad_messages_are_refused(lmx: Any, checkpoint: Path, text: str, named: str) -> None:
    ran = lmx("chat", checkpoint, "--messages", "-", stdin=text)
    assert ran.code == 3
    _check_error(ran.out, ran.err, named)


MODELS = [
    ("./absent", 4, "does not exist"),
    ("no/such/path", 4, "does not exist"),
    ("org/absent", 4, "not in the Hugging Face cache"),
    ("org/na--me", 4, "does not exist"),
    ("\x1b[31mred", 4, "does not exist"),
    ("x" * 5000, 4, "does not exist"),
    ("a\0b", 4, "does not exist"),
]


@pytest.mark.parametrize(("model", "code", "named"), MODELS, ids=lambda value: repr(value)[:30])
def test_a_model_that_is_not_there(lmx: Any, tmp_path: Path, model: str, code: int, named: str) -> None:
    ran = lmx("chat", model, "-p", "x", "--offline")
    assert ran.code == code
    _check_error(ran.out, ran.err, named)


def test_a_file_is_no_model(lmx: Any, tmp_path: Path) -> None:
    for name, named in (("model.gguf", "GGUF"), ("model.bin", "is a file")):
        (tmp_path / name).write_bytes(b"GGUF")
        ran = lmx("show", tmp_path / name)
        assert ran.code == 3
        _check_error(ran.out, ran.err, named)


@pytest.mark.parametrize("command", [["eval", "--ids"], ["chat", "--messages"], ["bench", "--compare"]])
def test_a_list_that_is_no_json_is_told_by_its_own_place(lmx, command, tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[\n  {"a": 1},\n  oops\n]')
    done = lmx(*command, path)
    assert done.code == 3
    assert "(line 3, column 3)" in done.err


def test_a_revision_of_the_demo_is_refused(lmx):
    done = lmx("show", "--revision", "main")
    assert (done.code, "--revision main is for models of the hub" in done.err) == (2, True)


def test_a_size_of_nothing_is_refused(lmx, tmp_path):
    done = lmx("convert", tmp_path, tmp_path / "out", "--max-shard-size", "0")
    assert (done.code, "--max-shard-size is 0" in done.err) == (2, True)


def test_a_check_without_its_text_fails_before_any_work(lmx, tmp_path):
    source = write_family(tmp_path / "model", "olmoe")
    done = lmx("quantize", source, tmp_path / "out", "--check", tmp_path / "none.txt")
    assert (done.code, "none.txt' does not exist" in done.err) == (4, True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_sessions_alone_shows_its_help(lmx):
    done = lmx("sessions")
    assert (done.code, done.err) == (0, "")
    assert "export" in done.out


def test_every_command_fits_its_line_and_has_an_example(lmx):
    listed = lmx("--help").out
    assert "..." not in listed.partition("Commands:")[2]
    names = [line.split()[0] for line in listed.partition("Commands:")[2].splitlines() if line.startswith("  ")]
    for name in names[:-1]:  # the last line is the example
        assert "Example: lmx" in lmx(name, "--help").out


def test_a_wrong_choice_is_told_in_plain_words(lmx):
    done = lmx("generate", "--device", "gpu", "--prompt-ids", "1")
    assert done.code == 2
    assert "Invalid value for '--device': 'gpu' is not one of 'auto'" in done.err
