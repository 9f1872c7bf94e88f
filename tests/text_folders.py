"""Checkpoint folders with tokenizers: small ones made here, and the real ones of ../shared put together."""

import json
from collections.abc import Mapping
from pathlib import Path

from support import SHARED
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('No system role') }}"
    "{% elif m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, how are you? I am fine, thank you!",
    "user assistant system: what is the capital of France? The capital of France is Paris.",
    "Grüße aus Köln, naïve café; 生活 и жизнь. 1 2 3 10 100 [INST] [/INST]",
] * 4


def write_folder(
    folder: Path, tokenizer: Tokenizer | str, template: str | None = None, config: Mapping[str, object] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def byte_level_folder(folder: Path, template: str | None = CHATML) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return write_folder(folder, tokenizer, template, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def byte_fallback_folder(folder: Path, template: str | None = INST, legacy: bool = False) -> Path:
    """A Llama-like vocabulary; `legacy`: spaces by a normalizer (Prepend) rather than Metaspace."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    words = [word for line in CORPUS for word in line.replace(" ", " ▁").split()]  # short words: merges stay inside
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    document = json.loads(tokenizer.to_str())
    vocab = document["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    return write_folder(folder, json.dumps(document), template, config)


def real_folders(root: Path) -> dict[str, Path]:
    """The published tokenizers with the templates that belong to them."""
    data, chat = SHARED / "data", SHARED / "data" / "chat"

    def put(name: str, tokenizer: str, template: str, config: Mapping[str, object]) -> Path:
        folder = root / name
        folder.mkdir()
        (folder / "tokenizer.json").symlink_to((data / tokenizer).resolve())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    def read(name: str) -> str:
        return (chat / name).read_text(encoding="utf-8")

    mistral = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    address = {"bos_token": "|||IP_ADDRESS|||", "eos_token": "|||IP_ADDRESS|||", "pad_token": "<|padding|>"}
    dbrx = json.loads((data / "dbrx/tokenizer_config.ASSEMBLED.json").read_text())
    gemma = json.loads((data / "recurrent_gemma/tokenizer_config-it.ASSEMBLED.json").read_text())
    metaspace = "mixtral/tokenizer.metaspace.json"
    return {
        "mixtral": put("mixtral", metaspace, read("mixtral-8x7b-instruct-v0.1.jinja"), mistral),
        "mixtral-22b": put("mixtral-22b", metaspace, read("mixtral-8x22b-instruct-v0.1.gguf.jinja"), mistral),
        "mixtral-old": put(
            "mixtral-old", "mixtral/tokenizer.json", read("mixtral-8x7b-instruct-v0.1.old.jinja"), mistral
        ),
        "dbrx": put("dbrx", "dbrx/tokenizer.json", read("dbrx-instruct.jinja"), dbrx),
        "gemma": put("gemma", "recurrent_gemma/tokenizer.json", read("recurrentgemma-it.jinja"), gemma),
        "olmoe-0924": put("olmoe-0924", "olmoe/tokenizer.json", read("olmoe-1b-7b-0924-instruct.jinja"), end),
        "olmoe-0125": put(
            "olmoe-0125", "olmoe/tokenizer-pii-special.json", read("olmoe-1b-7b-0125-instruct.jinja"), address
        ),
        "falcon": put("falcon", "falcon_mamba/tokenizer.json", CHATML, {"eos_token": "<|endoftext|>"}),
    }
