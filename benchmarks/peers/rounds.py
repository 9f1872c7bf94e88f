"""Programs side by side: each in a process of its own and in turn, round after round; medians, and ratios by round."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

PEERS = Path(__file__).parent
TRANSFORMERS = "transformers + bitsandbytes NF4"


@dataclass
class Figures:
    """Tokens a second by (program, test), one a round; and what lmx said of its share of the ceilings."""

    speeds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    peak_memory: list[float] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    def add(self, program: str, test: str, speed: float) -> None:
        """One round's figure; what a slow program generates less of stands beside what lmx generates at that depth."""
        kind, _, depth = test.partition("@")
        same = (
            known
            for name, known in self.speeds
            if name == "lmx" and (known[:2], known.partition("@")[2]) == (kind[:2], depth)
        )
        named = test if program == "lmx" else next(same, test)
        self.speeds.setdefault((program, named), []).append(speed)
        say(f"  {program} {test}: {speed:.2f} tokens/s")

    def fail(self, program: str) -> None:
        """Leave a program out, of which a round is missing."""
        self.failed.add(program)
        self.speeds = {key: speeds for key, speeds in self.speeds.items() if key[0] != program}

    def add_lmx(self, test: str, result: Mapping[str, Any]) -> None:
        """What `lmx bench -o jsonl` said of a test; where it ran on a card, the memory is the card's."""
        self.add("lmx", test, result["tokens_per_second_mean"])
        share = result["flops_utilization" if test.startswith("pp") else "bandwidth_utilization"]
        if share is not None:
            self.shares.setdefault(test, []).append(share)
        if result["bytes_per_token"] is not None:  # a prompt's is not told
            self.bytes_per_token[test] = result["bytes_per_token"]
        self.peak_memory.append(result["peak_gpu_memory_bytes"] or result["peak_memory_bytes"])

    def table(self, title: str) -> Iterator[str]:
        """A Markdown table, a row for each program and test, and what lmx read and took."""
        yield f"### {title}"
        yield ""
        yield "| test | program | tokens/s | lmx is faster by | of lmx's ceiling |"
        yield "|---|---|---|---|---|"
        for test in dict.fromkeys(test for program, test in self.speeds if program == "lmx"):
            ours = self.speeds["lmx", test]
            share = f"{median(self.shares[test]):.0%}" if test in self.shares else ""
            yield f"| {test} | lmx | {median(ours):.2f} | | {share} |"
            for (program, other), speeds in self.speeds.items():
                if other == test and program != "lmx":
                    ratio = median(one / two for one, two in zip(ours, speeds, strict=True))
                    yield f"| {test} | {program} | {median(speeds):.2f} | {ratio:.2f} | |"
        yield ""
        read = ", ".join(f"{test} {value / 1e6:.0f} MB" for test, value in self.bytes_per_token.items())
        for program in sorted(self.failed):
            yield f"{program} failed here, and is left out."
        yield f"Bytes a token: {read}. Peak memory of lmx: {max(self.peak_memory) / 1e9:.2f} GB."


def time_lmx(model: str, test: str, options: Sequence[str]) -> Any:
    """One repetition of `pp512`, `tg128` or `tg64@3968` by `lmx bench --dummy`: the object of its JSON."""
    kind, _, depth = test.partition("@")
    prompt, generated = (kind[2:], "0") if kind.startswith("pp") else ("0", kind[2:])
    command = [sys.executable, "-m", "lmx", "bench", model, "--dummy", "-q", *options]
    return run([*command, "-p", prompt, "-n", generated, "-d", depth or "0", "-r", "1", "-o", "jsonl"])


def time_transformers(
    config: Mapping[str, object], tests: Sequence[str], threads: int, device: str = "cpu"
) -> dict[str, float]:
    """Tokens a second of each test by transformers with bitsandbytes."""
    answer: dict[str, float] = run_on_config("transformers_runner.py", config, str(threads), ",".join(tests), device)
    return answer


def random_gguf(name: str, folder: Path, python: str) -> Path:
    """A GGUF of random weights of one of the models of random_gguf.py, written where it is not there yet."""
    path = folder / f"{name}-q4_0.gguf"
    if not path.exists():
        say(f"writing {path}")
        command = [python, str(PEERS / "random_gguf.py"), name, str(path)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return path


def run_on_config(script: str, config: Mapping[str, object], *arguments: str) -> Any:
    """Run one of the scripts beside this one on a config.json, in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        return run([sys.executable, str(PEERS / script), file.name], *arguments)


def run(command: list[str], *more: str) -> Any:
    """The last line that a program writes, which is JSON. Ends this one where that one fails."""
    result = subprocess.run([*command, *more], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def say(text: str) -> None:
    """Tell how far it is, on stderr."""
    sys.stderr.write(text + "\n")
