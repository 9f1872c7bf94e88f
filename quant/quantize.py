"""The streaming quantizer: one matrix at a time from a source to the shards of the output.

Memory is a few matrices, whatever the model's size. Several matrices are in work at once, each on one thread: threads
inside a matrix would wait for each other at every step of it. They are finished in their order, so that an output's
bytes depend on the source and the options alone.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from lmx.core.checkpoint import INDEX, Source
from lmx.core.errors import InputError
from lmx.core.files import quoted
from lmx.core.finite import check_finite
from lmx.core.job import check_job, job_identity
from lmx.core.jsonfile import JSON, to_json
from lmx.core.mapped import Advice, stored_name
from lmx.core.output import OutputFolder, open_output
from lmx.core.shards import DEFAULT_SHARD_BYTES, Shard, ShardWriter, Slot, Unit, index_json, plan_shards
from lmx.quant.apply import quantize_matrix
from lmx.quant.error import rmse
from lmx.quant.memory import PIECE_BYTES, choose_workers, peak_memory_bytes, predict_peak, results_in_flight
from lmx.quant.plan import Plan, PlannedWeight, plan_source
from lmx.quant.quanto_files import QMAP, quantization_map
from lmx.quant.report import Checked, Event, Finished, Progress, Report, make_report
from lmx.quant.serialize import matrix_tensors
from lmx.quant.spec import QuantSpec

# Changes whenever the same source and options would give other bytes: a half-made output of before is not continued.
_FORMAT = 1
_COMPUTE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Options:
    """How to write. workers: matrices in work at a time, None for torch's number of threads; companions: files that
    are copied as they are (tokenizer, template, licence); check: compares the complete output, before it has its name,
    with the source, and returns the KL divergence, or raises: then the output does not get its name.
    """

    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    max_memory_bytes: int | None = None
    workers: int | None = None
    force: bool = False
    companions: tuple[Path, ...] = ()
    check: Callable[[Path], float] | None = None


def predict(source: Source, target: Path, spec: QuantSpec, options: Options = Options()) -> Report:
    """What `quantize` would do, from headers alone: nothing is written and no tensor is read.

    Raises InputError for a source that does not fit its config; ResourceError where `max_memory_bytes` is too little.
    """
    plan = plan_source(source, spec)
    workers = choose_workers(plan, options.workers or torch.get_num_threads(), options.max_memory_bytes)
    shards = plan_output(plan, options.max_shard_bytes)
    return make_report(plan, shards, source.label, target, predict_peak(plan, workers))


def quantize(source: Source, target: Path, spec: QuantSpec, options: Options = Options()) -> Iterator[Event]:
    """Quantize a checkpoint into the new folder `target`, in the serialization of bitsandbytes or optimum-quanto.

    Yields a Progress for each weight, Checked if there is a check, and at last Finished. A run that was stopped goes on
    at the first shard that was not complete, and ends with the same bytes. Until the end there is nothing under the
    target's name but what was.

    Raises:
        UsageError: the target holds the source, or has the name of a file.
        InputError: the source is damaged (NaN and infinity included), unsupported or quantized already.
        ConflictError: the target exists and `force` is not set, or another process works on it.
        ResourceError: disk or memory would not suffice, or did not.

    """
    check_job(source, target, force=options.force)
    plan = plan_source(source, spec)
    workers = choose_workers(plan, options.workers or torch.get_num_threads(), options.max_memory_bytes)
    shards = plan_output(plan, options.max_shard_bytes)
    job = job_identity(source, shards, _FORMAT, asdict(spec))
    with open_output(target, job, force=options.force) as output:
        output.check_room(shards)
        try:
            with _one_thread_each(workers) as pool:
                yield from _write_shards(source, plan, shards, output, pool, results_in_flight(workers) - 1)
        except InputError:
            output.discard()
            raise
        errors = _errors(output, shards)
        _add_small_files(output, source, plan, shards, options.companions)
        peak = peak_memory_bytes()
        if options.check is not None:
            yield Checked(options.check(output.folder))
        output.commit()
    yield Finished(make_report(plan, shards, source.label, target, peak, errors))


def plan_output(plan: Plan, max_shard_bytes: int) -> tuple[Shard, ...]:
    """The files of the output; the experts of a layer stay together where they fit in one."""
    places = enumerate(plan.weights)
    groups = groupby(places, key=lambda item: item[1].bank or item[0])
    return plan_shards(([_unit(weight, plan.spec) for _, weight in group] for _, group in groups), max_shard_bytes)


def _unit(weight: PlannedWeight, spec: QuantSpec) -> Unit:
    if weight.kept:
        return (Slot(weight.name, weight.dtype, weight.shape),)
    return tuple(Slot(name, stored_name(dtype), shape) for name, (dtype, shape) in weight.layout(spec).items())


@dataclass(frozen=True, slots=True)
class _Work:
    """A weight on its way: its source as a view, and what it became if it is quantized."""

    weight: PlannedWeight
    tensor: Tensor
    result: Future["_Quantized"] | None


@dataclass(frozen=True, slots=True)
class _Quantized:
    tensors: dict[str, Tensor]
    error: float


def _write_shards(
    source: Source, plan: Plan, shards: Sequence[Shard], output: OutputFolder, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Progress]:
    by_first = {_unit(weight, plan.spec)[0].name: weight for weight in plan.weights}
    held = {shard.name: [by_first[unit[0].name] for unit in shard.units] for shard in shards}
    open_shards = [shard for shard in shards if shard.name not in output.finished]
    total = plan.parameters  # thousands of weights: not counted again for each of them
    resumed = total - sum(weight.parameters for shard in open_shards for weight in held[shard.name])
    done = resumed
    if resumed:
        yield Progress("", done, total, resumed)
    work = _pipeline(source, (w for shard in open_shards for w in held[shard.name]), plan.spec, pool, ahead)
    for shard in open_shards:
        errors: dict[str, JSON] = {}
        with output.shard(shard, errors) as file:
            for weight in held[shard.name]:
                error = _write(source, next(work), file)
                if error is not None:
                    errors[weight.name] = error
                done += weight.parameters
                yield Progress(weight.name, done, total, resumed)


def _pipeline(
    source: Source, weights: Iterable[PlannedWeight], spec: QuantSpec, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[_Work]:
    """Weights in their order, while the next `ahead` of them are already in work."""
    waiting: deque[_Work] = deque()
    try:
        for weight in weights:
            waiting.append(_start(source, weight, spec, pool))
            if len(waiting) >= ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for work in waiting:
            if work.result is not None:
                work.result.cancel()


def _start(source: Source, weight: PlannedWeight, spec: QuantSpec, pool: ThreadPoolExecutor) -> _Work:
    tensor = weight.piece.of(source.tensor(weight.piece.hub))
    if weight.kept:
        return _Work(weight, tensor, None)
    if weight.piece.rows is None:
        source.advise(weight.piece.hub, Advice.WILL_NEED)

    def work() -> _Quantized:
        try:
            return _quantize(tensor, weight, spec)
        finally:
            source.advise(weight.piece.hub, Advice.DONT_NEED)

    return _Work(weight, tensor, pool.submit(work))


def _quantize(tensor: Tensor, weight: PlannedWeight, spec: QuantSpec) -> _Quantized:
    tensor = tensor.contiguous()
    q = quantize_matrix(tensor, spec, quoted(weight.piece.hub))
    return _Quantized(matrix_tensors(weight.name, q), rmse(q, tensor))


def _write(source: Source, work: _Work, file: ShardWriter) -> float | None:
    """Write what became of one weight; returns the error of a matrix that was quantized."""
    if work.result is None:
        _copy(source, work, file)
        return None
    made = work.result.result()
    for name, tensor in made.tensors.items():
        file.write(name, tensor)
    return made.error


def _copy(source: Source, work: _Work, file: ShardWriter) -> None:
    """Write a kept weight, a few rows at a time, its pages let go behind it."""
    tensor = work.tensor if work.tensor.ndim else work.tensor.view(1)
    step = max(1, PIECE_BYTES * len(tensor) // max(1, tensor.nbytes))
    first_byte = 0
    for rows in tensor.split(step):
        check_finite(rows, quoted(work.weight.piece.hub))
        file.write(work.weight.name, rows, first_byte)
        first_byte += rows.nbytes
        source.advise(work.weight.piece.hub, Advice.DONT_NEED)


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads, and the caller for the time, run torch on one thread each."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "quantize", initializer=torch.set_num_threads, initargs=(1,))
    try:
        torch.set_num_threads(1)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _errors(output: OutputFolder, shards: Sequence[Shard]) -> dict[str, float]:
    notes = (item for shard in shards for item in output.finished[shard.name].items())
    return {name: float(error) for name, error in notes if isinstance(error, float)}


def _add_small_files(
    output: OutputFolder, source: Source, plan: Plan, shards: Sequence[Shard], companions: Sequence[Path]
) -> None:
    if len(shards) > 1:
        output.add(INDEX, index_json(shards))
    output.add("config.json", to_json(quantized_config(source, plan)))
    if plan.spec.quanto_type is not None:
        names = (weight.name for weight in plan.weights if weight.kept is None)
        output.add(QMAP, to_json(quantization_map(names, plan.spec.quanto_type)))
    output.copy(companions)


def quantized_config(source: Source, plan: Plan) -> dict[str, object]:
    """The source's config.json with the `quantization_config` that transformers reads; optimum-quanto writes none."""
    if plan.spec.quanto_type is not None:
        return dict(source.config)
    stored = Counter(weight.dtype for weight in plan.weights if weight.kept is None)
    compute = _COMPUTE_DTYPES[stored.most_common(1)[0][0] if stored else "BF16"]
    return {**source.config, "quantization_config": plan.spec.to_config(plan.kept_modules, compute)}
