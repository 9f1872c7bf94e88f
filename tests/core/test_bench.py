import statistics
import time

import pytest
import torch
from families import FAMILIES, config_of
from frozen_graph import FrozenGraph
from torch.utils.flop_counter import FlopCounterMode

from lmx.core.bench import Bench, Workload, attention_flops, mean_and_deviation, state_bytes_read
from lmx.core.ceilings import measure_ceilings
from lmx.core.errors import UsageError
from lmx.core.generate import PROMPT_CHUNK
from lmx.core.graph_stepper import GraphStepper
from lmx.core.loader import build
from lmx.core.model import LanguageModel


def small(family: str, **changes: object) -> LanguageModel:
    torch.manual_seed(0)
    model = build(config_of(family, **changes))
    model.reset_parameters()
    return model.eval()


class Watched:
    """Notes how many tokens each call of a model brings, and at which length of the state."""

    def __init__(self, model: LanguageModel) -> None:
        self.calls: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _model: object, _args: object, given: dict) -> None:
        self.calls.append((given["state"].length, given["input_ids"].shape[1]))


@pytest.mark.parametrize(
    ("work", "name"),
    [(Workload(512), "pp512"), (Workload(0, 128, 4096), "tg128"), (Workload(8, 4), "pp8+tg4")],
)
def test_names_are_those_of_llama_bench(work: Workload, name: str) -> None:
    assert work.name == name


@pytest.mark.parametrize("numbers", [(0, 0, 5), (-1, 3, 0), (1, 1, -1)])
def test_a_workload_of_nothing_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        Workload(*numbers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_run_begins_at_the_depth_which_is_read_once(family: str) -> None:
    model = small(family)
    watched = Watched(model)
    bench = Bench(model)
    samples = list(bench.run(Workload(3, 4, depth=20), 2))
    warm = [(20, 3), (23, 1), (24, 1), (25, 1)]
    run = [*warm, (26, 1)]
    assert watched.calls == [(0, 20), *warm, *run, *run]
    assert all(0 < sample.first_token_seconds < sample.seconds for sample in samples)
    watched.calls.clear()
    list(bench.run(Workload(0, 1, depth=30), 1))
    assert watched.calls == [(20, 10), (30, 1), (30, 1)], "the depth is gone on with"
    watched.calls.clear()
    list(bench.run(Workload(0, 1, depth=4), 1))
    assert watched.calls == [(0, 4), (4, 1), (4, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_card_a_step_is_captured_before_the_clock_runs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all runs: a run of 128 tokens would else spend a good part of its time on it."""
    graphs: list[FrozenGraph] = []

    def make_graph(device: torch.device) -> FrozenGraph:
        graphs.append(FrozenGraph(device))
        return graphs[-1]

    model = small(family)
    monkeypatch.setattr(LanguageModel, "stepper", lambda self, state: GraphStepper(self, state, make_graph))
    bench = Bench(model)
    list(bench.run(Workload(0, 8, depth=5), 3))
    assert len(graphs) == 1
    list(bench.run(Workload(0, 8, depth=9), 1))
    assert len(graphs) == 1, "the state still lies where it lay"


def test_looks_between_tokens_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmx.core.bench.LOOK_SECONDS", 0.0)
    looks: list[float] = []

    def look() -> None:
        start = time.perf_counter()
        time.sleep(0.1)
        looks.append(time.perf_counter() - start)

    bench = Bench(small("mixtral"), look)
    start = time.perf_counter()
    samples = list(bench.run(Workload(3, 10), 2))
    elapsed = time.perf_counter() - start
    assert len(looks) >= 20
    assert all(sample.seconds > 0 for sample in samples)
    # Two seconds of looks; what else there is takes milliseconds, or some tenths of seconds on a busy machine.
    assert sum(sample.seconds for sample in samples) <= elapsed - sum(looks)


def test_long_prompts_are_read_in_the_chunks_of_generation() -> None:
    model = small("mixtral")
    watched = Watched(model)
    list(Bench(model).run(Workload(PROMPT_CHUNK + 10), 1))
    assert watched.calls[:2] == [(0, PROMPT_CHUNK), (PROMPT_CHUNK, 10)]


def test_mean_and_deviation() -> None:
    numbers = [3.0, 4.5, 7.25, 3.5]
    mean, deviation = mean_and_deviation(numbers)
    assert mean == pytest.approx(statistics.mean(numbers))
    assert deviation == pytest.approx(statistics.stdev(numbers))
    assert mean_and_deviation([2.0]) == (2.0, 0.0)


def test_attention_is_counted_as_torch_counts_its_products() -> None:
    model = small("mixtral")
    model.attention = "eager"  # batched products, which nothing else in this model is
    state = model.make_state()
    layers = list(model.make_state().layers)
    with torch.no_grad():
        model(torch.zeros(1, 37, dtype=torch.long), state=state)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, dtype=torch.long), state=state)
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    assert attention_flops(layers, model.config.attention_width, Workload(1, depth=37)) == products > 0


def test_attention_of_a_prompt_sees_what_came_before() -> None:
    layers = list(small("recurrent_gemma").make_state().layers)  # one attention layer of three, a window of 16
    assert attention_flops(layers, 64, Workload(4)) == 4 * 64 * (1 + 2 + 3 + 4)
    assert attention_flops(layers, 64, Workload(3, depth=14)) == 4 * 64 * (15 + 16 + 16)
    assert attention_flops(list(small("falcon_mamba").make_state().layers), 0, Workload(4)) == 0


def test_bytes_of_the_state_that_a_step_reads() -> None:
    # two layers, keys and values, two heads of width 16, in float32
    assert state_bytes_read(list(small("mixtral").make_state().layers), 10) == 2 * 2 * 2 * 16 * 4 * 10
    # two layers: 128 channels, 3 inputs of the convolution and 8 states each, in float32
    mamba = list(small("falcon_mamba").make_state().layers)
    assert state_bytes_read(mamba, 1) == state_bytes_read(mamba, 5000) == 2 * 128 * (3 + 8) * 4
    griffin = list(small("recurrent_gemma").make_state().layers)
    recurrent, key = 2 * 64 * (3 + 1) * 4, 2 * 16 * 4
    assert state_bytes_read(griffin, 10) == recurrent + 10 * key
    assert state_bytes_read(griffin, 500) == recurrent + 16 * key, "a ring holds its window"


def test_ceilings_are_of_this_machine() -> None:
    found = measure_ceilings(torch.device("cpu"), read_bytes=64 << 20, width=256, rounds=2)
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.flops < 1e16
