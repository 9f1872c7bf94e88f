"""How much memory converting takes at a published width: every way that a model of one family can go.

    python benchmarks/convert_published.py --dir /somewhere/with/15GB [--model mistralai/Mixtral-8x7B-v0.1] [--layers 2]

The source is a model of random weights of so many layers (`quantize_published.py` says how). It becomes a GGUF in Q8_0
(RecurrentGemma, which llama.cpp does not run, does not), that GGUF a checkpoint again, an NF4 checkpoint a plain one,
and a Mixtral Mistral's own files. For each: bytes written, and the growth of the resident set, mapped pages included,
beside the source's largest tensor.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from quantize_published import RepeatedSource

from lmx.api import open_folder
from lmx.conversion import Conversion
from lmx.convert.events import Finished
from lmx.convert.gguf_target import Options as GGUFOptions
from lmx.convert.gguf_target import write_gguf
from lmx.convert.mistral_target import write_mistral
from lmx.convert.plain import Options as Plain
from lmx.convert.plain import write_plain
from lmx.presets import PRESETS, preset
from lmx.quant.memory import peak_memory_bytes, reset_peak_memory
from lmx.quant.quantize import quantize
from lmx.quant.spec import QuantSpec

Job = Callable[[], Iterator[object]]


def measure(title: str, job: Job) -> None:
    """Run a conversion to its end and print what it took."""
    if not reset_peak_memory():
        raise SystemExit("this system does not let a process forget its peak of memory")
    before = peak_memory_bytes()
    *_, last = job()
    grown = peak_memory_bytes() - before
    if not isinstance(last, Finished):
        raise TypeError("a conversion ends with what it wrote")
    print(f"{title:28}{last.output_bytes / 1e9:7.2f} GB written, {grown / 1e6:6.0f} MB of memory", flush=True)


def convert_all(source: RepeatedSource, folder: Path) -> None:
    """Every way, one after the other; what no later one needs is removed."""
    gguf, plain, nf4, mistral = (folder / name for name in ("model.gguf", "plain", "nf4", "mistral"))
    family = source.config["model_type"]
    if family != "recurrent_gemma":
        measure("bf16 to GGUF, Q8_0", lambda: write_gguf(source, gguf, GGUFOptions("Q8_0", folder)))
        again = open_folder(gguf)
        measure("GGUF to the hub's layout", lambda: Conversion(plain).run(again, "model"))
        shutil.rmtree(plain)
        gguf.unlink()
    else:
        measure("bf16 to the hub's layout", lambda: write_plain(source, plain))
        shutil.rmtree(plain)
    list(quantize(source, nf4, QuantSpec("nf4")))
    stored = open_folder(nf4)
    measure("NF4 to the hub's layout", lambda: Conversion(plain).run(stored, "model"))
    shutil.rmtree(plain)
    if family == "mixtral":
        measure("bf16 to Mistral's files", lambda: write_mistral(source, mistral, Plain()))


def main() -> None:
    """Convert in a folder that is removed at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--model", choices=PRESETS, default="mistralai/Mixtral-8x7B-v0.1", metavar="ORG/NAME")
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    folder = options.dir / "convert-published"
    folder.mkdir(parents=True)
    try:
        source = RepeatedSource(folder / "random.bin", preset(options.model), options.layers, "random")
        largest = max(info.nbytes for info in source.infos.values())
        print(f"{options.model}, {options.layers} layers, largest tensor {largest / 1e6:.0f} MB", flush=True)
        convert_all(source, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
