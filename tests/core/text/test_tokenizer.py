"""Encoding and decoding against sentencepiece, tiktoken, llama.cpp and transformers; the config's additions."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support import SHARED, needs_shared
from text_folders import CHATML, byte_fallback_folder, byte_level_folder
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lmx.core.errors import InputError, NotFoundError
from lmx.core.text.files import read_tokenizer_files
from lmx.core.text.tokenizer import Tokenizer

Load = Callable[[str], Tokenizer]
VECTORS = SHARED / "data" / "vectors"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("real:mixtral", "mixtral-v1-sentencepiece.json"),
        ("real:mixtral-old", "mixtral-v1-sentencepiece.json"),
        ("real:dbrx", "dbrx-tiktoken.json"),
    ],
)
@needs_shared
def test_vectors(name: str, file: str, tokenizer_of: Load) -> None:
    tokenizer = tokenizer_of(name)
    cases = json.loads((VECTORS / file).read_text())
    assert len(cases) > 40
    if name == "real:mixtral":  # Metaspace adds no space before a space
        cases = [case for case in cases if not case["text"].startswith(" ")]
    for case in cases:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]


@needs_shared
def test_llamacpp_vectors(tokenizer_of: Load) -> None:
    texts = (VECTORS / "ggml-vocab-falcon.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (VECTORS / "ggml-vocab-falcon.gguf.out").read_text().split("\n")
    assert len(texts) > 40
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer_of("real:falcon").encode(text) == [int(i) for i in line.split()], text


@pytest.mark.parametrize("name", ["dbrx", "falcon_mamba", "mixtral", "olmoe", "recurrent_gemma"])
@needs_shared
def test_parity_with_transformers(name: str, tokenizer_of: Load) -> None:
    ours = tokenizer_of(f"checkpoint:{name}")
    theirs = AutoTokenizer.from_pretrained(SHARED / "checkpoints" / name)
    rng = random.Random(3)
    texts = ["", " ", "Hello", "  a  b\n", "🦙 naïve 生活", "<s> <|im_end|>x</s>", "My name is Ada."]
    texts += ["".join(rng.choices("ab 12\n.,é生🦙<|>", k=rng.randrange(1, 40))) for _ in range(50)]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for _ in range(50):
        ids = [rng.randrange(len(theirs)) for _ in range(rng.randrange(1, 30))]
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
        messages = [
            {"role": role, "content": "".join(rng.choices("ab 12\n.,é生🦙", k=9))}
            for role in ("user", "assistant", "user")
        ]
        for prompt in (True, False):
            chat = ours.encode_chat(messages, prompt)
            assert chat.text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert chat.ids == list(expected)
    info = ours.info
    assert (info.bos_id, info.eos_id, info.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert set(info.special_ids) >= set(theirs.all_special_ids)
    assert info.vocab_size == len(theirs)


@needs_shared
def test_gemma_ids_come_from_the_config(tokenizer_of: Load) -> None:
    gemma = tokenizer_of("real:gemma")
    assert gemma.encode("<start_of_turn>user\n")[:2] == [2, 106]
    assert gemma.info.end_of_turn_ids == (1, 107)
    assert gemma.decode([106, 107]) == ""


@needs_shared
def test_dbrx_gap_is_hidden(tokenizer_of: Load) -> None:
    info = tokenizer_of("real:dbrx").info
    assert {100261, 100275} <= info.hidden_ids
    assert info.vocab_size == 100280
    assert info.end_of_turn_ids == (100257, 100279)


def _edit(folder: Path, file: str, **changes: object) -> Path:
    path = folder / file
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**document, **changes}))
    return folder


def test_bos_comes_once_in_text_and_never_in_chat(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_fallback_folder(tmp_path / "a"))
    assert tokenizer.encode("Hello").count(1) == 1
    assert tokenizer.encode("Hello", add_special_tokens=False).count(1) == 0
    assert tokenizer.encode_chat([{"role": "user", "content": "Hello"}]).ids.count(1) == 1
    tokenizer = Tokenizer.load(byte_fallback_folder(tmp_path / "b", template=CHATML))
    assert tokenizer.encode_chat([{"role": "user", "content": "Hello"}]).ids.count(1) == 0


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "a")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    text = "The quick brown fox jumps over the lazy dog."
    expected = Tokenizer.load(folder).encode(text)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert Tokenizer.load(folder).encode(text) == expected


def test_template_places(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "a", template=None)
    _edit(folder, "tokenizer_config.json", chat_template="inline")
    assert read_tokenizer_files(folder).chat_template == "inline"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    _edit(folder, "tokenizer_config.json", chat_template=named)
    assert read_tokenizer_files(folder).chat_template == "named"
    _edit(
        folder, "tokenizer_config.json", chat_template=[{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]
    )
    assert read_tokenizer_files(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("file")
    assert read_tokenizer_files(folder).chat_template == "file"


def test_special_tokens_by_either_file_and_form(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": None})
    )
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "pad_token": "[nowhere]"})
    )
    info = Tokenizer.load(folder).info
    assert (info.bos_id, info.eos_id, info.pad_id) == (0, 2, None)


def test_added_tokens_of_the_config(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "a", template=None)
    size = Tokenizer.load(folder).info.vocab_size
    token = {"content": "<extra>", "special": True}
    _edit(folder, "tokenizer_config.json", added_tokens_decoder={str(size): token})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a<extra>b").count(size) == 1
    assert tokenizer.decode([size]) == ""
    _edit(folder, "tokenizer_config.json", added_tokens_decoder={str(size + 5): token})
    with pytest.raises(InputError, match="<extra>"):
        Tokenizer.load(folder)


def test_stripping_tokens_are_sealed_with_their_flags(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Plain

    folder = byte_level_folder(tmp_path / "a")
    plain = Plain.from_file(str(folder / "tokenizer.json"))
    plain.add_tokens([AddedToken("<end>", rstrip=True, lstrip=True, special=True), AddedToken("fox", single_word=True)])
    plain.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<end> \n{% endfor %}")
    tokenizer = Tokenizer.load(folder)
    chat = tokenizer.encode_chat([{"role": "user", "content": "a fox, foxes"}, {"role": "assistant", "content": "b "}])
    assert chat.ids == tokenizer.encode(chat.text)
    assert chat.ids.count(tokenizer.token_to_id("<end>")) == 2
    assert chat.reply_end is None  # <end> takes the space that the reply ends with


@pytest.mark.parametrize("ids", [[-1], [1 << 40], ["a"], [None]])
def test_bad_ids(ids: list[int], tokenizer_of: Load) -> None:
    with pytest.raises(InputError):
        tokenizer_of("byte-level").decode(ids)


def test_ids_without_a_token_decode_to_nothing(tokenizer_of: Load) -> None:
    assert tokenizer_of("byte-level").decode([100_000]) == ""


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
