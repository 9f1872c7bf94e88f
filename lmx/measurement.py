"""What a benchmark measured of a loaded model, and what it says of each test."""

import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import lmx
from lmx.device import peak_gpu_memory

if TYPE_CHECKING:
    from lmx.core.bench import Sample, Workload
    from lmx.core.ceilings import Ceilings
    from lmx.core.model import LanguageModel
    from lmx.quant.footprint import Footprint


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


class Subject:
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
        self._bandwidths: list[float] = []
        self._looks_at_memory = False
        self._peak_bytes = 0

    def begin(self, work: "Workload") -> None:
        """Before the first run of a workload."""
        self._looks_at_memory = bool(work.generate) and self._device.type == "cpu"
        self._bandwidths.clear()
        self.look()

    def look(self) -> None:
        """Between tokens and runs: what the model took of memory and, if it generates on the CPU, what memory gives."""
        from lmx.core.ceilings import bandwidth_beside
        from lmx.core.memory import peak_memory_bytes, reset_peak_memory

        self._peak_bytes = max(self._peak_bytes, peak_memory_bytes())
        if self._looks_at_memory:
            self._bandwidths.append(bandwidth_beside(self._device))
            reset_peak_memory()  # of the measurement just done

    def result(self, work: "Workload", samples: "Sequence[Sample]") -> Result:
        """What the samples of a workload say."""
        import torch

        from lmx.core.bench import mean_and_deviation
        from lmx.core.native.compiled import kernel_path
        from lmx.core.registry import family_of

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
            peak_memory_bytes=self._peak_bytes,
            peak_gpu_memory_bytes=peak_gpu_memory() if device.type == "cuda" else None,
            bytes_per_token=per_token,
            bandwidth_utilization=self._bandwidth_utilization(per_token, mean),
            flops_utilization=self._flops_utilization(work, mean),
            memory_bandwidth=self._bandwidth,
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
        return per_token * speed / self._bandwidth

    @property
    def _bandwidth(self) -> float:
        """What memory gave beside the runs; else what it gave before the model was loaded."""
        return fmean(self._bandwidths) if self._bandwidths else self._ceilings.bandwidth

    def _flops_utilization(self, work: "Workload", speed: float) -> float | None:
        """The share of the matrix peak that a prompt takes; None as above, or where tokens are generated."""
        from lmx.core.bench import attention_flops
        from lmx.core.generate import prompt_chunk_for

        if work.generate or not self._is_of_one_kind:
            return None
        heads = self._footprint.head_parameters * ceil(work.prompt / prompt_chunk_for(self._model.device))
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
