"""The model in the box, as installed: it answers, remembers, and is the same model to transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralForCausalLM

import lmx
from lmx.core.answer import Finished
from lmx.core.checkpoint import Checkpoint
from lmx.core.loader import load_model
from lmx.core.model import LanguageModel
from lmx.core.sampling import Sampling
from lmx.core.session import ChatSession
from lmx.core.text.tokenizer import Tokenizer

DEMO = Path(lmx.__file__).parent / "demo"
MAX_BYTES = 8 * 1024 * 1024

COMMANDS = {
    "How do I make a model smaller?": "lmx quantize MODEL --4bit",
    "How can I download Mixtral?": "lmx pull REPO",
    "How do I resume a session?": "lmx chat MODEL --session NAME",
    "Which models have I already downloaded?": "lmx list",
    "how can I remove a model from my disk?": "lmx rm MODEL",
    "How do I measure the perplexity of my model?": "lmx eval MODEL --text FILE",
    "I want to benchmark Mixtral": "lmx bench MODEL",
    "Which families work?": "FalconMamba, RecurrentGemma, OLMoE, DBRX and Mixtral",
    "What is NF4?": "4-bit",
    "How do I leave?": "/exit",
    "What is 7 + 8?": "7 + 8 = 15",
    "What is the capital of Spain?": "only a small demo",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model(Checkpoint.open(DEMO))


@pytest.fixture
def session(model: LanguageModel, tokenizer: Tokenizer) -> ChatSession:
    return ChatSession(model, tokenizer, Sampling(), stop_ids=frozenset(model.config.eos_ids), max_new_tokens=64)


def say(session: ChatSession, text: str) -> str:
    *_, last = session.ask(text)
    assert isinstance(last, Finished)
    assert last.reason == "stop"
    return last.text


def test_is_small_enough_for_the_wheel() -> None:
    files = {file.name: file.stat().st_size for file in DEMO.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) <= MAX_BYTES


@pytest.mark.parametrize(("question", "part"), COMMANDS.items())
def test_answers_wordings_that_were_not_trained(session: ChatSession, question: str, part: str) -> None:
    assert part in say(session, question)


@pytest.mark.parametrize("name", ["Nkechi", "Xiomara", "Zbigniew"])
def test_remembers_a_name_across_other_questions(session: ChatSession, name: str) -> None:
    assert name in say(session, f"Hello, my name is {name}.")
    assert "lmx quantize" in say(session, "How do I make a model smaller?")
    assert "15" in say(session, "What is 7 + 8?")
    assert name in say(session, "What is my name?")


def test_knows_no_name_that_it_was_not_told(session: ChatSession) -> None:
    assert "not told me your name" in say(session, "What is my name?")


def test_transformers_answers_the_same(tokenizer: Tokenizer) -> None:
    """Greedy ids over a conversation, both in float32; and the prompt ids, by its tokenizer and template."""
    ours = load_model(Checkpoint.open(DEMO), dtype=torch.float32)
    theirs = MixtralForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(DEMO)
    session = ChatSession(ours, tokenizer, Sampling(), stop_ids=frozenset(ours.config.eos_ids), system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for line in ["Hi, I'm Xiomara", "How do I make a model smaller?", "tell me about dragons", "What is my name?"]:
        *_, last = session.ask(line)
        assert isinstance(last, Finished)
        messages.append({"role": "user", "content": line})
        prompt = their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert session.prompt_ids == prompt["input_ids"][0].tolist()
        generated = theirs.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1] :]
        assert list(last.token_ids) == generated.tolist()
        messages.append({"role": "assistant", "content": last.text})
