"""Train the model in the box: a small Mixtral that knows lmx, on one CPU core, from dialogues that the seed decides.

    python examples/train_demo.py --out lmx/demo

It makes the dialogues (demo_dialogues.py) and a byte-level BPE on them, trains on lmx's own modules, writes a
checkpoint in the hub's layout, and measures it on wordings and names that were never trained (demo/heldout.toml).
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from demo_dialogues import Dialogue, Maker
from demo_evaluate import report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from lmx.core.loader import build
from lmx.core.model import LanguageModel
from lmx.core.writer import save_model

PAD, BOS, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]
IGNORED = -100
CONTEXT = 1024

TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- '<|system|>' + message['content'] + '<|end|>' }}
    {%- elif message['role'] == 'user' %}
        {{- '<|user|>' + message['content'] + '<|end|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' + message['content'] + '<|end|>' }}
    {%- else %}
        {{- raise_exception('Roles are user and assistant, after at most one system message.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def config_for(vocabulary: int) -> dict[str, object]:
    """The model's config.json: 2.1 million parameters, of which 0.7 million work on a token."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.05,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "bos_token_id": SPECIAL.index(BOS),
        "eos_token_id": SPECIAL.index(END),
        "pad_token_id": SPECIAL.index(PAD),
    }


def train_tokenizer(maker: Maker, vocabulary: int) -> Tokenizer:
    """A byte-level BPE, digits apart (sums are learned digit by digit), over some thousand dialogues."""
    lines = [message["content"] for _ in range(12000) for message in maker.dialogue().messages]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return tokenizer


def encode(dialogue: Dialogue, tokenizer: Tokenizer, everything: bool = False) -> tuple[list[int], list[int]]:
    """A dialogue's ids as the template renders it, and its labels: the assistant's words and the end of its turn.

    everything: the user's and the system's words are labels too.
    """
    ids, labels = [SPECIAL.index(BOS)], [IGNORED]
    roles = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    for message in dialogue.messages:
        words = [*tokenizer.encode(message["content"], add_special_tokens=False).ids, SPECIAL.index(END)]
        ids += [SPECIAL.index(roles[message["role"]]), *words]
        learned = everything or message["role"] == "assistant"
        labels += [IGNORED, *(words if learned else [IGNORED] * len(words))]
    return ids, labels


@dataclass(frozen=True)
class Stage:
    """A part of the training: its steps, the longest dialogue and the batch in tokens, and what is learned.

    Short dialogues come first: copying, and telling questions apart, are learned sooner where little can confuse them.
    In the first stage the user's lines are learned too (`everything`), as any text is, so that words get a meaning.
    memories: how many of the dialogues tell and ask facts. most_turns: beyond six for long conversations.
    """

    steps: int
    longest: int
    tokens: int
    everything: bool = False
    memories: float = 0.6
    most_turns: int = 6


@dataclass(frozen=True)
class Round:
    """One warm-up and one cosine over its stages, with fresh dialogues. Its end is rounded to what a file keeps."""

    rate: float
    stages: tuple[Stage, ...]


ROUNDS = (
    Round(3e-3, (Stage(650, 64, 1000, everything=True), Stage(1040, 128, 1600), Stage(910, 256, 2400))),
    Round(
        2e-3,
        (
            Stage(900, 128, 1600, memories=0.85),
            Stage(600, 256, 2400, memories=0.75),
            Stage(200, 768, 3000, most_turns=24),
        ),
    ),
)


def lessons(maker: Maker, tokenizer: Tokenizer, stages: Iterable[Stage]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a round, stage after stage."""
    for stage in stages:
        yield from islice(batches(maker, tokenizer, stage), stage.steps)


def batches(maker: Maker, tokenizer: Tokenizer, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches [rows, length] of ids and labels; rows of one batch are alike in length."""
    while True:
        pool = [
            encode(maker.dialogue(stage.memories, stage.most_turns), tokenizer, stage.everything) for _ in range(1200)
        ]
        pool = sorted((pair for pair in pool if len(pair[0]) <= stage.longest), key=lambda pair: len(pair[0]))
        cuts: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if (len(cuts[-1]) + 1) * len(pair[0]) > stage.tokens:
                cuts.append([])
            cuts[-1].append(pair)
        maker.rng.shuffle(cuts)
        for rows in cuts:
            width = max(len(ids) for ids, _ in rows)
            yield (
                torch.tensor([ids + [SPECIAL.index(PAD)] * (width - len(ids)) for ids, _ in rows]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
            )


def train(model: LanguageModel, data: Iterator[tuple[Tensor, Tensor]], steps: int, peak: float) -> float:
    """AdamW with warm-up and a cosine to zero. Returns the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.05, fused=True)
    warm_up = min(100, steps // 10 + 1)
    history: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        progress = max(0.0, (step - warm_up) / max(1, steps - warm_up))
        rate = peak * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = next(data)
        # Padding stands at the end of a row, where no real token sees it, and has no labels: no mask is needed.
        output = model(ids, labels=labels, output_router_logits=True)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balance = model.config.router_aux_loss_coef * output.aux_loss.item()
        history.append(output.loss.item() - balance)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            recent = history[-100:]
            print(
                f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.4f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    last = history[-max(1, steps // 10) :]
    return sum(last) / len(last)


def extra_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Tokenizer, template and generation defaults, as the hub spells them."""
    generation = {
        "bos_token_id": SPECIAL.index(BOS),
        "eos_token_id": [SPECIAL.index(END)],
        "pad_token_id": SPECIAL.index(PAD),
        "do_sample": False,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        "generation_config.json": (json.dumps(generation, indent=2) + "\n").encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


def scaled(stages: Iterable[Stage], factor: float) -> tuple[Stage, ...]:
    """The same stages with more or fewer steps."""
    return tuple(replace(stage, steps=max(1, round(stage.steps * factor))) for stage in stages)


def main() -> None:
    """Train, write, measure."""
    usual = sum(stage.steps for lap in ROUNDS for stage in lap.stages)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--steps", type=int, default=usual, help=f"optimizer steps in all (default {usual})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    maker = Maker(options.seed)
    tokenizer = train_tokenizer(maker, options.vocabulary)
    config = config_for(tokenizer.get_vocab_size())
    model = build(config)
    model.reset_parameters()
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, seed {options.seed}, {options.threads} thread(s), torch {torch.__version__}")
    for number, lap in enumerate(ROUNDS):
        maker = Maker(options.seed + number) if number else maker
        stages = scaled(lap.stages, options.steps / usual)
        loss = train(model, lessons(maker, tokenizer, stages), sum(stage.steps for stage in stages), lap.rate)
        print(f"round {number + 1}: loss {loss:.4f} over the last tenth; {time.monotonic() - started:.0f} s so far")
    save_model(model, options.out, config=config, dtype=torch.bfloat16, extra_files=extra_files(tokenizer))
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{size:,} bytes in {options.out}")
    report(options.out, options.seed)


if __name__ == "__main__":
    main()
