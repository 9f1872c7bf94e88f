"""Train the model in the box: a small Mixtral that knows lmx, on one CPU core, from dialogues that the seed decides.

    python examples/train_demo.py --out lmx/demo

It makes the dialogues (demo_dialogues.py) and a byte-level BPE on them, trains on lmx's own modules, writes a
checkpoint in the hub's layout, and measures it on wordings and names that were never trained: those of
demo/heldout.toml that may be looked at. demo_evaluate.py also counts the others.
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
HIDDEN = 192
HEAD_WIDTH = 32
ROPE_THETA = 10000.0

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
    """The model's config.json: 3.7 million parameters, of which 1.4 million work on a token."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 224,
        "num_hidden_layers": 3,
        "num_attention_heads": HIDDEN // HEAD_WIDTH,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.03,
        "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_THETA,
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


def encode(dialogue: Dialogue, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A dialogue's ids as the template renders it, and its labels: the assistant's words and the end of its turn."""
    ids, labels = [SPECIAL.index(BOS)], [IGNORED]
    roles = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    for message in dialogue.messages:
        words = [*tokenizer.encode(message["content"], add_special_tokens=False).ids, SPECIAL.index(END)]
        ids += [SPECIAL.index(roles[message["role"]]), *words]
        labels += [IGNORED, *(words if message["role"] == "assistant" else [IGNORED] * len(words))]
    return ids, labels


@dataclass(frozen=True)
class Stage:
    """A part of the training: its steps, the longest dialogue and the batch in tokens, and what dialogues are made of.

    memories, echoes, sums, most_turns: as `Maker.dialogue` takes them.
    """

    steps: int
    longest: int
    tokens: int
    memories: float = 0.6
    echoes: float = 0.02
    sums: float = 0.03
    most_turns: int = 6


# Drills first: all that is remembered rests on copying. Then short dialogues, some very long ones, and the usual.
STAGES = (
    Stage(600, 96, 1200, memories=0.85, echoes=0.35, sums=0.25),
    Stage(3300, 128, 1600, memories=0.7, echoes=0.06, sums=0.06),
    Stage(200, 640, 3000, memories=0.7, most_turns=20),
    Stage(2500, 256, 2000, memories=0.7),
)


def lessons(maker: Maker, tokenizer: Tokenizer, stages: Iterable[Stage]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the whole training, stage after stage."""
    for stage in stages:
        yield from islice(batches(maker, tokenizer, stage), stage.steps)


def batches(maker: Maker, tokenizer: Tokenizer, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches [rows, length] of ids and labels; rows of one batch are alike in length."""
    while True:
        pool = [
            encode(maker.dialogue(stage.memories, stage.echoes, stage.sums, stage.most_turns), tokenizer)
            for _ in range(1200)
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


@torch.no_grad()
def initialise(model: LanguageModel) -> None:
    """Random weights, but for two heads of the first layer: they begin by looking one and two tokens back.

    Copying a name that was never seen needs such a head (arXiv 2209.11895), and a small model is slow to find one. Its
    scores must depend on distance alone, so the embeddings get a common mean, which the heads' queries and keys read:
    rotated by their positions, these differ least at the wanted distance.
    """
    model.reset_parameters()
    embedding = model.get_parameter("decoder.embed.weight")
    embedding.mul_(3.0).add_(embedding.std())
    query, key = (model.get_parameter(f"decoder.layers.0.attention.{name}.weight") for name in "qk")
    hidden, half, sharp = embedding.shape[1], HEAD_WIDTH // 2, 4
    angles = ROPE_THETA ** (-torch.arange(sharp) / half)  # radians a token, of the fastest channels
    strength = 9.0 / hidden
    key[:sharp] = strength
    for head in (0, 1):
        rows = query[head * HEAD_WIDTH : (head + 1) * HEAD_WIDTH]  # [head_dim, hidden], channels (i, half + i) turn
        rows[:sharp] = (strength * torch.cos(angles * (head + 1)))[:, None]
        rows[half : half + sharp] = (-strength * torch.sin(angles * (head + 1)))[:, None]


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


def main() -> None:
    """Train, write, measure."""
    usual = sum(stage.steps for stage in STAGES)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--steps", type=int, default=usual, help=f"optimizer steps (default {usual})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2.5e-3, help="the highest learning rate")
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    maker = Maker(options.seed)
    tokenizer = train_tokenizer(maker, options.vocabulary)
    config = config_for(tokenizer.get_vocab_size())
    model = build(config)
    initialise(model)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, seed {options.seed}, {options.threads} thread(s), torch {torch.__version__}")
    stages = [replace(stage, steps=max(1, round(stage.steps * options.steps / usual))) for stage in STAGES]
    steps = sum(stage.steps for stage in stages)
    loss = train(model, lessons(maker, tokenizer, stages), steps, options.rate)
    save_model(model, options.out, config=config, dtype=torch.bfloat16, extra_files=extra_files(tokenizer))
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"loss {loss:.4f} over the last tenth; {time.monotonic() - started:.0f} s; {size:,} bytes in {options.out}")
    report(options.out, options.seed, parts=["dev"])


if __name__ == "__main__":
    main()
