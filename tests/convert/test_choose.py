"""What a run needs of a repository, against listings of repositories as they are on the hub."""

from collections.abc import Mapping

import pytest
from pulls import MIXTRAL, numbered

from lmx.convert.choose import NOT_ASKED, NOT_NEEDED, SECOND_COPY, WHICH_COPY, choose
from lmx.convert.listing import RemoteFile
from lmx.core.errors import InputError

DIGEST = "0" * 64


def files(*names: str, sizes: Mapping[str, int] | None = None) -> list[RemoteFile]:
    return [RemoteFile(name, (sizes or {}).get(name, 10), DIGEST) for name in names]


def chosen(*names: str) -> set[str]:
    return {file.name for file in choose(files(*names)).files}


def test_of_mixtrals_listing_the_safetensors_only() -> None:
    sizes = dict.fromkeys((name for name in MIXTRAL if name.endswith((".pt", ".bin", ".safetensors"))), 4_900_000_000)
    choice = choose(files(*MIXTRAL, sizes=sizes))
    assert {file.name for file in choice.files} == {
        *("README.md", "config.json", "generation_config.json", "LICENSE"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *numbered("model-{:05}-of-{:05}.safetensors", 19),
        "model.safetensors.index.json",
    }
    reasons = {group.reason: group for group in choice.left_out}
    assert reasons.keys() == {SECOND_COPY, NOT_NEEDED}
    assert set(reasons[NOT_NEEDED].names) == {".gitattributes", "params.json", "tokenizer.model"}
    assert reasons[SECOND_COPY].nbytes == (8 + 19 + 1) * 4_900_000_000 + 10  # and the second index
    taken, left = sum(file.size for file in choice.files), sum(group.nbytes for group in choice.left_out)
    assert taken + left == sum(file.size for file in files(*MIXTRAL, sizes=sizes))


CASES: dict[str, tuple[list[str], set[str]]] = {
    "one file": (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "model.onnx"], {"model.safetensors"}),
    "one file and shards": (
        ["model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        {"model.safetensors"},
    ),
    "another precision": (
        ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "model.fp16-00001-of-00001.safetensors"],
        {"model-00001-of-00001.safetensors", "model.safetensors.index.json"},
    ),
    "shards of other names": (
        ["a.safetensors", "b.safetensors", "model.safetensors.index.json", "consolidated.safetensors"],
        {"a.safetensors", "b.safetensors", "model.safetensors.index.json"},
    ),
    "pickles": (
        ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "flax_model.msgpack"],
        {"pytorch_model.bin"},
    ),
    "pickled shards": (
        ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "scheduler.pt"],
        {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"},
    ),
    "the publisher's own": (
        ["consolidated.safetensors", "params.json", "tokenizer.model.v3"],
        {"consolidated.safetensors", "params.json", "tokenizer.model.v3"},
    ),
    "its pickles": (
        ["consolidated.00.pth", "consolidated.01.pth", "params.json"],
        {"consolidated.00.pth", "consolidated.01.pth", "params.json"},
    ),
    "one of its own": (["2b.pt", "tokenizer.model"], {"2b.pt", "tokenizer.model"}),
    "one GGUF": (["model-q4_0.gguf"], {"model-q4_0.gguf"}),
    "one GGUF in parts": (
        ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"],
        {"model-00001-of-00002.gguf", "model-00002-of-00002.gguf"},
    ),
    "no weights": (["tokenizer.json", "config.json", "plot.png"], {"tokenizer.json", "config.json"}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_copy_of_the_weights(name: str) -> None:
    names, expected = CASES[name]
    assert chosen(*names) == expected


def test_globs() -> None:
    names = ["config.json", "model.safetensors", "model.gguf", "onnx/model.onnx", "onnx/config.json"]

    def take(include: list[str], exclude: list[str]) -> set[str]:
        choice = choose(files(*names), include, exclude)
        assert len(choice.files) + sum(len(group.names) for group in choice.left_out) == len(names)
        return {file.name for file in choice.files}

    assert take(["*.gguf"], []) == {"model.gguf"}
    assert take(["onnx/"], ["*.json"]) == {"onnx/model.onnx"}
    assert take([], ["*.safetensors"]) == {"config.json"}
    assert choose(files(*names), [], ["*.safetensors"]).left_out[0].reason == NOT_ASKED
    with pytest.raises(InputError, match="no file"):
        take(["*.bin"], [])


def test_small_files_come_first() -> None:
    sizes = {"model.safetensors": 10**9, "tokenizer.json": 10**6, "config.json": 600}
    choice = choose(files(*sizes, sizes=sizes))
    assert [file.name for file in choice.files] == ["config.json", "tokenizer.json", "model.safetensors"]


def test_a_name_that_a_disk_may_not_hold_is_refused_only_if_it_is_wanted() -> None:
    assert {file.name for file in choose(files("config.json", "what?.png")).files} == {"config.json"}
    with pytest.raises(InputError, match="what"):
        choose(files("config.json", "what?.png"), ["*"])


def test_of_several_weights_one_must_be_named() -> None:
    choice = choose(files("config.json", "model-q4_0.gguf", "model-q8_0.gguf"))
    assert {group.reason: group.names for group in choice.left_out} == {
        WHICH_COPY: ("model-q4_0.gguf", "model-q8_0.gguf")
    }


def test_a_repository_without_anything_is_refused() -> None:
    for names in ((), (".gitattributes", "plot.png")):
        with pytest.raises(InputError, match="no file of the repository is one that a run needs"):
            choose(files(*names))
