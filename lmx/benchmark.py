"""How fast models run here, and how far from what this machine can do. Importing this imports no torch."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from lmx.api import choose_spec, demo_path, load_core, model_name, open_checkpoint, open_folder
from lmx.core.checkpoint import Checkpoint
from lmx.core.files import read_bounded
from lmx.core.jsonfile import parse_json
from lmx.device import Device, choose_budgets, choose_device, reset_gpu_memory
from lmx.dtypes import choose_dtype
from lmx.measurement import Result, Subject
from lmx.memory import Needed, check_memory
from lmx.presets import Config, build_dummy, preset
from lmx.pulling import Watcher, unwatched

if TYPE_CHECKING:
    from lmx.core.bench import Workload
    from lmx.core.layers.attention import Implementation
    from lmx.core.model import LanguageModel
    from lmx.core.placement import Share
    from lmx.quant.apply import HeadScheme
    from lmx.quant.spec import QuantSpec

_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Setting:
    """How models are loaded and run: `lmx.load`'s arguments, and double quantization of a four-bit `quantize`.

    dummy: with random weights at their size; nothing is read or fetched.
    """

    device: Device = "auto"
    dtype: str | None = None
    quantize: str | None = None
    double_quant: bool = False
    head_scheme: "HeadScheme | None" = None
    attention: "Implementation" = "sdpa"
    gpu_memory: int | None = None
    dummy: bool = False
    revision: str | None = None
    offline: bool = False
    watch: Watcher = unwatched

    @property
    def spec(self) -> "QuantSpec | None":
        """How to quantize while loading. Raises UsageError for a scheme that there is not."""
        spec = choose_spec(self.quantize)
        return None if spec is None else replace(spec, double_quant=self.double_quant)


@dataclass(frozen=True)
class Step:
    """What is being done with a model now."""

    model: str
    doing: str


@dataclass(frozen=True)
class Making:
    """Weights will be made in memory that lie in no file; told before it is done."""

    model: str
    needed: Needed


@dataclass(frozen=True)
class Placed:
    """A model was loaded by a plan for the cards: what lies where, of so many layers."""

    model: str
    shares: "tuple[Share, ...]"
    layers: int


Event = Step | Making | Placed | Result


def benchmark(
    models: Sequence[str | Path | None], workloads: Sequence["Workload"], repetitions: int, setting: Setting
) -> Iterator[Event]:
    """Run every workload on every model, one model in memory at a time; a `Result` for each, and what is done between.

    models: as for `lmx.load`. Raises as `lmx.load`; ResourceError for a dummy that would not fit.
    """
    for model in models:
        yield from _benchmark_one(model, workloads, repetitions, setting)
        gc.collect()


def _benchmark_one(
    model: str | Path | None, workloads: Sequence["Workload"], repetitions: int, setting: Setting
) -> Iterator[Event]:
    from lmx.core.bench import Bench
    from lmx.core.ceilings import measure_ceilings
    from lmx.core.memory import reset_peak_memory

    import_module("lmx.quant.dummy")  # and all that loading takes, which is no part of its time
    name = model_name(model, setting.revision)
    origin = _find(model, setting)
    needed = None
    if isinstance(origin, Path):
        needed = check_memory(open_folder(origin), setting.dtype, setting.spec, setting.device)
    if needed is not None:
        yield Making(name, needed)
    yield Step(name, "measuring the machine")
    ceilings = measure_ceilings(choose_device(setting.device))
    reset_peak_memory()  # of the measurement just done, or of the model before
    reset_gpu_memory()
    yield Step(name, "loading")
    start = perf_counter()
    loaded = _load(origin, setting)
    seconds = perf_counter() - start
    if loaded.shares:
        yield Placed(name, loaded.shares, len(loaded.decoder.layers))
    subject = Subject(name, loaded, seconds, ceilings)
    bench = Bench(loaded, subject.look)
    for work in workloads:
        yield Step(name, _label(work, 0, repetitions))
        samples = []
        subject.begin(work)
        for sample in bench.run(work, repetitions):
            samples.append(sample)
            subject.look()
            yield Step(name, _label(work, len(samples), repetitions))
        yield subject.result(work, samples)


def _label(work: "Workload", done: int, repetitions: int) -> str:
    depth = f" @ d{work.depth}" if work.depth else ""
    return f"{work.name}{depth} {done}/{repetitions}"


def _find(model: str | Path | None, setting: Setting) -> Config | Path:
    """Where a model comes from: a folder or GGUF, after pulling it if need be, or for a dummy its config."""
    if not setting.dummy:
        found = open_checkpoint(model, revision=setting.revision, offline=setting.offline, watch=setting.watch)
        return Path(found.label)
    if isinstance(model, str) and not Path(model).is_dir():
        return preset(model)
    file = (demo_path() if model is None else Path(model)) / "config.json"
    return parse_json(read_bounded(file, _CONFIG_BYTES), str(file))


def _load(origin: Config | Path, setting: Setting) -> "LanguageModel":
    from lmx.core.model import LanguageModel

    if isinstance(origin, Path):
        checkpoint: Checkpoint = open_folder(origin)
        dtype = choose_dtype(setting.dtype, checkpoint)
        budgets = choose_budgets(setting.device, setting.gpu_memory)
        model: LanguageModel = load_core(
            checkpoint, setting.spec, "causal", setting.head_scheme, dtype, choose_device(setting.device), budgets
        )
    else:
        dtype_name, head = setting.dtype or "bf16", setting.head_scheme
        model = build_dummy(origin, setting.spec, head, dtype_name, setting.device, setting.gpu_memory)
    model.attention = setting.attention
    return model
