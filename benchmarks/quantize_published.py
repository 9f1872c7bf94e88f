"""Quantize a model of a published size from end to end: bytes written, peak memory, parameters a second.

    python benchmarks/quantize_published.py --dir /somewhere/with/30GB [--double-quant] [--cold]
    python benchmarks/quantize_published.py --dir DIR --model allenai/OLMoE-1B-7B-0924 --layers 2
    python benchmarks/quantize_published.py --dir DIR --dry-run

LMX_KERNELS=torch in the environment measures the same without the CPU's kernels; --dry-run only predicts.

Mixtral-8x7B unless --model or --config says otherwise. The 93 GB of its source need not exist: it is one file of random
bfloat16 numbers, mapped as a checkpoint is, and every fifth tensor of the same shape is the same part of it. So
pages are touched, counted and let go as with the real files. With --cold the file's pages are also dropped from the
cache after each use, and each matrix is read from the disk anew.
The output is a real one, synced; it is removed at the end unless --keep is given, which adds the demo's tokenizer.
Before and after, as many bytes as it takes (4 GB at most) are written to the same disk and synced: a quantizer can be
no faster than that. On a virtual machine, `stolen_cpu_seconds` is what its neighbours took of its cores meanwhile.
"""

import argparse
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import cycle
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from peers.neighbours import stolen_seconds

from lmx.api import demo_path
from lmx.core.jsonfile import JSON, read_json
from lmx.core.loader import build, hub_shapes
from lmx.core.mapped import Advice, FileMap
from lmx.core.native.compiled import kernel_path
from lmx.core.registry import family_of
from lmx.core.safetensors_file import TensorInfo
from lmx.presets import PRESETS, preset
from lmx.quant.quantize import Options, predict, quantize
from lmx.quant.report import Finished, Progress
from lmx.quant.spec import QuantSpec

COPIES = 5
Fill = Literal["random", "cold", "holes"]


class RepeatedSource:
    """A `Source` in which every fifth tensor of one shape is the same bytes of one mapped file.

    No more than that many are in work at a time, so pages are counted as if each tensor had its own. fill: "random"
    numbers; "cold", the same, dropped from the system's cache after each use; "holes", nothing, for predictions.
    """

    label = "a model of random weights"
    generation_config: dict[str, JSON] | None = None

    def __init__(self, file: Path, config: Mapping[str, object], layers: int | None, fill: Fill) -> None:
        changed = {**config, layers_key(config): layers or config[layers_key(config)]}
        self.config: dict[str, JSON] = json.loads(json.dumps(changed))
        with torch.device("meta"):
            model = build(self.config)
        shapes = hub_shapes(model, family_of(self.config))
        places = _write_file(file, shapes.values(), fill)
        turns = {shape: cycle(copies) for shape, copies in places.items()}
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, "BF16", shape, file, next(turns[shape]), 2 * prod(shape))
            for name, shape in shapes.items()
        }
        self.files = (file,)
        self._fd = os.open(file, os.O_RDONLY)
        self._map = FileMap(self._fd, file.stat().st_size, file)
        self._cold = fill == "cold"

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file."""
        info = self.infos[name]
        return self._map.view(info.dtype, info.shape, info.offset, info.nbytes)

    def advise(self, name: str, advice: Advice) -> None:
        """As a checkpoint does; `cold`: what is let go also leaves the system's cache."""
        info = self.infos[name]
        self._map.advise(advice, info.offset, info.nbytes)
        if self._cold and advice is Advice.DONT_NEED:
            os.posix_fadvise(self._fd, info.offset, info.nbytes, os.POSIX_FADV_DONTNEED)


def layers_key(config: Mapping[str, object]) -> str:
    """What a family's config.json calls its number of layers."""
    return "n_layers" if "n_layers" in config else "num_hidden_layers"


def _write_file(file: Path, shapes: Iterable[tuple[int, ...]], fill: Fill) -> dict[tuple[int, ...], list[int]]:
    """Numbers for each shape, up to five times; returns where each begins."""
    places: dict[tuple[int, ...], list[int]] = {}
    with file.open("wb") as out:
        for shape, count in sorted(Counter(shapes).items()):
            places[shape] = []
            for _ in range(min(count, COPIES)):
                places[shape].append(out.tell())
                if fill == "holes":
                    out.seek(2 * prod(shape), os.SEEK_CUR)
                else:
                    _write_random(out, prod(shape))
        out.truncate()
        out.flush()
        os.fsync(out.fileno())
    return places


def _write_random(out: BinaryIO, elements: int) -> None:
    for start in range(0, elements, 1 << 22):
        piece = torch.randn(min(1 << 22, elements - start)) * 0.02
        out.write(piece.bfloat16().view(torch.uint8).numpy().data)


def disk_speed(file: Path, nbytes: int) -> float:
    """Million bytes a second of writing a file of random bytes and syncing it, as dd conv=fsync does."""
    piece, nbytes = os.urandom(1 << 24), min(nbytes, 4_000_000_000)
    start = time.perf_counter()
    try:
        with file.open("wb", buffering=0) as out:
            for at in range(0, nbytes, len(piece)):
                out.write(piece[: nbytes - at])
            os.fsync(out.fileno())
        return nbytes / 1e6 / (time.perf_counter() - start)
    finally:
        file.unlink(missing_ok=True)


def foretell(source: RepeatedSource, target: Path, spec: QuantSpec, options: Options) -> dict[str, object]:
    """What `lmx quantize --dry-run` says of a model of this size."""
    predicted = predict(source, target, spec, options)
    return {
        "source_bytes": predicted.source_bytes,
        "output_bytes": predicted.output_bytes,
        "peak_memory_bytes": predicted.peak_memory_bytes,
    }


def run(source: RepeatedSource, target: Path, spec: QuantSpec, options: Options) -> dict[str, object]:
    """Predict, quantize and measure."""
    predicted = predict(source, target, spec, options)
    disk = [disk_speed(target.with_name("plain.bin"), predicted.output_bytes)]
    start = shown = time.perf_counter()
    cpu, stolen = time.process_time(), stolen_seconds()
    for event in quantize(source, target, spec, options):
        if isinstance(event, Progress) and time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"{event.parameters / 1e9:6.2f} of {event.total / 1e9:.2f} billion parameters", flush=True)
        elif isinstance(event, Finished):
            report = event.report
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    stolen = stolen_seconds() - stolen
    disk.append(disk_speed(target.with_name("plain.bin"), predicted.output_bytes))
    return {
        "model_type": source.config["model_type"],
        "scheme": spec.scheme,
        "double_quant": spec.double_quant,
        "layers": source.config[layers_key(source.config)],
        "parameters": report.parameters,
        "quantized_share": round(report.quantized_share, 4),
        "source_bytes": report.source_bytes,
        "output_bytes": report.output_bytes,
        "disk_bytes": sum(path.stat().st_blocks * 512 for path in target.iterdir()),
        "predicted_output_bytes": predicted.output_bytes,
        "peak_memory_bytes": report.peak_memory_bytes,
        "predicted_peak_memory_bytes": predicted.peak_memory_bytes,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "stolen_cpu_seconds": round(stolen, 1),
        "million_parameters_per_second": round(report.parameters / seconds / 1e6, 1),
        "million_bytes_per_second": round(report.output_bytes / seconds / 1e6),
        "disk_million_bytes_per_second": [round(speed) for speed in disk],
        "threads": torch.get_num_threads(),
        "kernels": kernel_path(),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--model", choices=PRESETS, default="mistralai/Mixtral-8x7B-v0.1", metavar="ORG/NAME")
    parser.add_argument("--config", type=Path, help="a config.json, in place of --model")
    parser.add_argument("--layers", type=int, help="so many layers instead of all: memory does not depend on it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scheme", choices=("nf4", "fp4", "int8"), default="nf4")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--cold", action="store_true", help="read every matrix from the disk anew")
    parser.add_argument("--keep", action="store_true", help="leave the output in DIR/quantized, to be run")
    parser.add_argument("--dry-run", action="store_true", help="only predict bytes and memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.dir.mkdir(parents=True, exist_ok=True)
    file, target = arguments.dir / "random.bin", arguments.dir / "quantized"
    try:
        config = preset(arguments.model) if arguments.config is None else read_json(arguments.config)
        fill: Fill = "holes" if arguments.dry_run else "cold" if arguments.cold else "random"
        source = RepeatedSource(file, config, arguments.layers, fill)
        spec = QuantSpec(arguments.scheme, double_quant=arguments.double_quant)
        work = foretell if arguments.dry_run else run
        print(json.dumps(work(source, target, spec, Options(force=True)), indent=2))
        if arguments.keep and not arguments.dry_run:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(demo_path() / name, target)
    finally:
        file.unlink(missing_ok=True)
        if not arguments.keep:
            shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    main()
