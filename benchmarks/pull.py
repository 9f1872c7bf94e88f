"""`lmx pull` beside huggingface_hub's `hf download`, from a server on this machine that speaks the hub's protocol.

    python benchmarks/pull.py [--megabytes 500] [--rounds 3]
    python benchmarks/pull.py --cuts 40

Whole commands in turn, each into a fresh cache: seconds, and the median of the rounds' ratios. lmx hashes what comes
and syncs it; `hf` (without Xet, which needs the real hub) does neither. The server, the one that the tests use, runs in
this process and shares the cores. --cuts pulls 64 MB so often instead, cuts each pull once at a random offset, and
prints how many bytes came twice.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hub_server import Cut, Fault, Hub, environment, serving_two

WEIGHTS = "model.safetensors"
KINDS: dict[Cut, str] = {
    "fin": "the connection ends in order",
    "rst": "it is reset",
    "stall": "it falls silent",
    "call": "the process is killed",
}
CUT_BYTES = 64_000_000
COMMANDS = {
    "lmx pull": (sys.executable, "-m", "lmx", "pull", "-q", "org/tiny"),
    "hf download": (sys.executable, "-m", "huggingface_hub.cli.hf", "download", "org/tiny"),
}


def files(nbytes: int) -> dict[str, bytes]:
    """A repository with one file of weights."""
    return {"config.json": b'{"model_type": "mixtral"}', "tokenizer.json": b"{}", WEIGHTS: os.urandom(nbytes)}


def start(command: tuple[str, ...], hub: Hub, cache: Path) -> "subprocess.Popen[bytes]":
    """A command whose hub is `hub`, and whose patience with a silent connection is a second."""
    settings = environment(hub, cache) | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: "subprocess.Popen[bytes]") -> None:
    """Wait for its end, which must be a good one."""
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(said.decode()[-2000:])


def seconds(command: tuple[str, ...], hub: Hub) -> float:
    """The wall time of a command with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        finish(start(command, hub, Path(cache)))
        return time.perf_counter() - begin


def compare(nbytes: int, rounds: int) -> None:
    """Print each command's seconds, and how they compare."""
    with serving_two(files(nbytes)) as (hub, _):
        turns = [{name: seconds(command, hub) for name, command in COMMANDS.items()} for _ in range(rounds)]
    for name in COMMANDS:
        spent = [turn[name] for turn in turns]
        speed = nbytes / 1e6 / median(spent)
        print(f"{name:12} {' '.join(f'{one:6.2f}' for one in spent)} s, median {speed:.0f} MB/s")
    ratio = median(turn["lmx pull"] / turn["hf download"] for turn in turns)
    print(f"lmx pull takes {ratio:.2f} times as long as hf download, {nbytes / 1e6:.0f} MB, {rounds} rounds")


def repeated_bytes(kind: Cut, offset: int, content: dict[str, bytes]) -> int:
    """Cut a pull once after so many bytes, let it come to its end, and count what came twice."""
    with serving_two(content) as (hub, store), tempfile.TemporaryDirectory() as cache:
        command = COMMANDS["lmx pull"]
        process = start(command, hub, Path(cache))
        store.faults = [Fault(kind, offset, process.kill)]
        if kind == "call":
            process.communicate()
            process = start(command, hub, Path(cache))
        finish(process)
        return store.sent - len(content[WEIGHTS])


def cut(count: int) -> None:
    """Print, for each kind of cut, the median and the most of what came twice."""
    content, offsets, kinds = files(CUT_BYTES), random.Random(0), list(KINDS)
    found: dict[Cut, list[int]] = {kind: [] for kind in kinds}
    for number in range(count):
        kind = kinds[number % len(kinds)]
        found[kind].append(repeated_bytes(kind, offsets.randrange(CUT_BYTES), content))
    print(f"{CUT_BYTES / 1e6:.0f} MB, {count} cuts; MB that came twice: median, most")
    for kind, repeated in found.items():
        if repeated:
            print(f"{KINDS[kind]:30} {median(repeated) / 1e6:6.1f} {max(repeated) / 1e6:6.1f}")


def main() -> None:
    """Compare or cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cuts", type=int, help="cut so many pulls instead")
    options = parser.parse_args()
    if options.cuts is None:
        compare(options.megabytes * 1_000_000, options.rounds)
    else:
        cut(options.cuts)


if __name__ == "__main__":
    main()
