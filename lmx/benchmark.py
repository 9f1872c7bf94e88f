"""How fast models run here, and how far from what this machine can do. Importing this imports no torch."""

import gc
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import lmx
from lmx.api import choose_dtype, choose_spec, demo_path, load_core, model_name, open_checkpoint, open_folder
from lmx.core.checkpoint import Checkpoint
from lmx.core.files import read_bounded
from lmx.core.jsonfile import parse_json
from lmx.device import Device, choose_budgets, choose_device, peak_gpu_memory, reset_gpu_memory
from lmx.memory import Needed, check_memory
from lmx.presets import Config, build_dummy, preset
from lmx.pulling import Watcher, unwatched

if TYPE_CHECKING:
    from lmx.core.bench import Sample, Workload
    from lmx.core.ceilings import Ceilings
    from lmx.core.layers.attention import Implementation
    from lmx.core.model import LanguageModel
    from lmx.quant.apply import HeadScheme
    from lmx.quant.footprint import Footprint
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
class Result:
    """One test of one model: the object of `lmx bench -o json` (docs/bench.md says what each field means)."""

    model: str
    architecture: str
    scheme: str
    parameters: int
    bytes: int
    device: str
    threads: int
    kernels: str
    test: str
    n_prompt: int
    n_gen: int
    depth: int
    repetitions: int
    tokens_per_second_mean: float
    tokens_per_second_stddev: float
    samples: tuple[float, ...]
    load_seconds: float
    first_token_seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int | None
    bytes_per_token: float | None
    bandwidth_utilization: float | None
    flops_utilization: float | None
    memory_bandwidth: float
    matrix_flops: float
    lmx_version: str
    torch_version: str
    cpu: str
    gpu: str | None
    date: str

    def to_json(self) -> dict[str, object]:
        """The fields by their names, the samples as a list."""
        return asdict(self) | {"samples": list(self.samples)}


Event = Step | Making | Result


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
    from lmx.quant.memory import reset_peak_memory

    import_module("lmx.quant.dummy")  # and all that loading takes, which is no part of its time
    name = model_name(model, setting.revision)
    origin = _find(model, setting)
    needed = None if not isinstance(origin, Path) else check_memory(open_folder(origin), setting.dtype, setting.spec)
    if needed is not None:
        yield Making(name, needed)
    yield Step(name, "measuring the machine")
    ceilings = measure_ceilings(choose_device(setting.device))
    reset_peak_memory()  # of the measurement just done, or of the model before
    reset_gpu_memory()
    yield Step(name, "loading")
    start = perf_counter()
    loaded = _load(origin, setting)
    subject = _Subject(name, loaded, perf_counter() - start, ceilings)
    bench = Bench(loaded)
    for work in workloads:
        yield Step(name, _label(work, 0, repetitions))
        samples = []
        for sample in bench.run(work, repetitions):
            samples.append(sample)
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


class _Subject:
    """A loaded model with what is the same in all of its results."""

    def __init__(self, name: str, model: "LanguageModel", load_seconds: float, ceilings: "Ceilings") -> None:
        from lmx.quant.footprint import measure_footprint

        self._name, self._model, self._load_seconds, self._ceilings = name, model, load_seconds, ceilings
        self._footprint: Footprint = measure_footprint(model)
        self._layers = model.make_state().layers
        placement = model.decoder.placement
        devices = (model.device,) if placement is None else placement.devices
        self._device_names = "+".join(map(str, devices))
        kinds = {device.type for device in devices}
        # The ceilings are those of one kind of device: what is spread over two has none of its own.
        self._is_of_one_kind = len(kinds) == 1
        self._device = next((device for device in devices if device.type != "cpu"), devices[0])

    def result(self, work: "Workload", samples: "Sequence[Sample]") -> Result:
        """What the samples of a workload say."""
        import torch

        from lmx.core.bench import mean_and_deviation
        from lmx.core.native.library import kernel_path
        from lmx.core.registry import family_of
        from lmx.quant.memory import peak_memory_bytes

        speeds = tuple(work.tokens / sample.seconds for sample in samples)
        mean, deviation = mean_and_deviation(speeds)
        per_token, device = self._bytes_per_token(work), self._device
        return Result(
            model=self._name,
            architecture=family_of({"model_type": self._model.family}).title,
            scheme=self._footprint.scheme,
            parameters=self._footprint.parameters,
            bytes=self._footprint.nbytes,
            device=self._device_names,
            threads=torch.get_num_threads(),
            kernels=kernel_path(),
            test=work.name,
            n_prompt=work.prompt,
            n_gen=work.generate,
            depth=work.depth,
            repetitions=len(samples),
            tokens_per_second_mean=mean,
            tokens_per_second_stddev=deviation,
            samples=speeds,
            load_seconds=self._load_seconds,
            first_token_seconds=mean_and_deviation([sample.first_token_seconds for sample in samples])[0],
            peak_memory_bytes=peak_memory_bytes(),
            peak_gpu_memory_bytes=peak_gpu_memory() if device.type == "cuda" else None,
            bytes_per_token=per_token,
            bandwidth_utilization=self._bandwidth_utilization(per_token, mean),
            flops_utilization=self._flops_utilization(work, mean),
            memory_bandwidth=self._ceilings.bandwidth,
            matrix_flops=self._ceilings.flops,
            lmx_version=lmx.__version__,
            torch_version=str(torch.__version__),
            cpu=cpu_name(),
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _bytes_per_token(self, work: "Workload") -> float | None:
        """Weights and state that a step reads, on average over the generated tokens; None where a prompt is timed."""
        from lmx.core.bench import state_bytes_read

        if work.prompt:
            return None
        lengths = range(work.depth + 1, work.depth + work.generate + 1)
        state = sum(state_bytes_read(self._layers, length) for length in lengths) / len(lengths)
        return self._footprint.step_bytes + state

    def _bandwidth_utilization(self, per_token: float | None, speed: float) -> float | None:
        """The share of the memory's bandwidth that generating takes; None for prompts, or over two kinds of device."""
        if per_token is None or not self._is_of_one_kind:
            return None
        return per_token * speed / self._ceilings.bandwidth

    def _flops_utilization(self, work: "Workload", speed: float) -> float | None:
        """The share of the matrix peak that a prompt takes; None as above, or where tokens are generated."""
        from lmx.core.bench import attention_flops
        from lmx.core.generate import PROMPT_CHUNK

        if work.generate or not self._is_of_one_kind:
            return None
        heads = self._footprint.head_parameters * ceil(work.prompt / PROMPT_CHUNK)
        products = 2 * (self._footprint.body_parameters * work.prompt + heads)
        attention = attention_flops(self._layers, self._model.config.attention_width, work)
        return (products + attention) / work.prompt * speed / self._ceilings.flops


def cpu_name() -> str:
    """What the maker calls this CPU; the kind of machine where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return platform.processor() or platform.machine()
