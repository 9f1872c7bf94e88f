"""One token a row at a time on a GPU: a step captured once in a CUDA graph and launched as a whole.

The twin of `lmx.core.stepper` for CUDA. A step of generation is hundreds of kernels of a few microseconds, which the
host cannot launch as fast as the card runs them; a graph is one launch. The host also stays one step ahead: while it
makes text of a token, the card computes with that token already, and where the answer ends there that step is undone.
"""

from collections.abc import Callable, Generator
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lmx.core.heads import CausalHead
from lmx.core.layers.moe import Bank
from lmx.core.layers.projection import Projection, is_watched
from lmx.core.sampling import Chosen, Sampler, finite
from lmx.core.state import StateError
from lmx.core.static_step import StaticStep
from lmx.core.stepper import Stepper

if TYPE_CHECKING:
    from lmx.core.model import AnyState, LanguageModel


_DEVICE = "cuda"


class Graph(Protocol):
    """Work of a device that can be noted once and then be run again, on the same tensors."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work, so that whatever is made at a first time is there."""
        ...

    def capture(self, work: Callable[[], None]) -> None:
        """Note the work without doing it. Raises RuntimeError where that cannot be."""
        ...

    def replay(self) -> None:
        """Do the noted work."""
        ...


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: torch keeps a workspace of cuBLAS, up to 32 MiB, for every stream it has seen."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """`torch.cuda.CUDAGraph`, warmed up and captured on a stream of its own, as torch's documentation wants it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _capture_stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run the work on the stream that it will be captured on."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> None:
        """Capture; what other threads do on the card meanwhile does not disturb it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            context = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with torch.cuda.stream(current), context:  # back to it even where the capture fails: torch's own does not
                work()
        self._graph = graph

    def replay(self) -> None:
        """Launch on the current stream."""
        if self._graph is None:
            raise RuntimeError("nothing was captured")
        self._graph.replay()


class GraphStepper(Stepper):
    """Continues one state with one model on one device. Keep it no longer than the weights stay as they are.

    refusal: why torch would not capture a step; steps then run one kernel at a time, to the same tokens.
    """

    def __init__(
        self, model: "LanguageModel", state: "AnyState", make_graph: Callable[[torch.device], Graph] = CudaGraph
    ) -> None:
        super().__init__(model, state)
        self.refusal: str | None = None
        self._make_graph = make_graph
        self._step: StaticStep | None = None
        self._graph: Graph | None = None
        self._is_captured = False

    @torch.no_grad()
    def feed(self, input_ids: Tensor) -> Tensor:
        """Advance the state by one token a row: input_ids [rows, 1] -> logits [rows, vocab]."""
        if not self._is_plain:
            return super().feed(input_ids)
        step = self._ready(None)
        step.tokens.copy_(input_ids)
        self._advance(step)
        return step.logits.clone()

    def choices(self, logits: Tensor, sampler: Sampler, limit: int | None = None) -> Generator[Chosen, None, None]:
        """See `Stepper.choices`. The state holds a choice when it is yielded, until the generator is closed there."""
        if not self._is_plain or self._state.batch_size != 1:
            yield from super().choices(logits, sampler, limit)
            return
        mailbox = Mailbox(self._model.device)
        self._choose_first(logits, sampler, mailbox)
        ahead = False
        try:
            for number in count(1):
                if number != limit:
                    self._go_on(mailbox)
                    ahead = True
                yield mailbox.receive()
                if not ahead:
                    return
                ahead = False
        finally:
            if ahead:
                self._take_back()

    @property
    def _is_plain(self) -> bool:
        """Whether the state is one that a static step continues: of rows alike, and with a beginning."""
        return self._state.length > 0 and self._state.lengths is None

    @torch.no_grad()
    def _choose_first(self, logits: Tensor, sampler: Sampler, mailbox: "Mailbox") -> None:
        step = self._ready(sampler)
        mailbox.begin()
        step.prepare()
        step.choose(logits)
        mailbox.send(step.report)

    @torch.no_grad()
    def _go_on(self, mailbox: "Mailbox") -> None:
        """Compute with the token that was chosen last, which the host may not know yet, and choose the next one."""
        step = self._step
        if step is None or not step.follows:
            raise StateError("the state was changed in the middle of an answer", "Close the answer's iterator first.")
        if step.make_room():
            self._graph = None
        mailbox.begin()
        step.prepare()
        self._advance(step)
        mailbox.send(step.report)

    @torch.no_grad()
    def _take_back(self) -> None:
        """Undo the last step, unless the state went elsewhere because nobody closed the answer in time."""
        if self._step is not None and self._step.follows:
            self._step.undo()

    def _ready(self, sampler: Sampler | None) -> StaticStep:
        """The step for the state as it is now; its graph is dropped where anything has moved or grown."""
        step = self._step
        if step is None or step.sampler is not sampler or not (step.follows or step.resume()):
            self._step = step = StaticStep(self._model, self._state, sampler)
            self._graph = None
        elif step.make_room():
            self._graph = None
        return step

    def _advance(self, step: StaticStep) -> None:
        """The first step of a kind warms up, the second is captured, all others are replayed."""
        if self._graph is None:
            self._graph, self._is_captured = self._make_graph(self._model.device), False
            self._graph.warm_up(step.run)
        else:
            if not self._is_captured and self.refusal is None:
                self._capture(self._graph, step)
            if self._is_captured:
                self._graph.replay()
            else:
                step.run()
        step.count()

    def _capture(self, graph: Graph, step: StaticStep) -> None:
        try:
            graph.capture(step.run)
        except RuntimeError as error:  # nothing was computed, so that the state is as it was
            self.refusal = str(error)
        else:
            self._is_captured = True


class Mailbox:
    """Brings what a device chose to the host, which may fetch it one step later."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_cuda = device, device.type == "cuda"
        self._reports = torch.zeros(2, 2, dtype=torch.float64, pin_memory=self._on_cuda)
        self._sent = self._received = 0
        self._begun: list[torch.cuda.Event] = []
        self._ended: list[torch.cuda.Event] = []
        if self._on_cuda:
            self._begun = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._ended = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def begin(self) -> None:
        """Note when the device begins with the next report."""
        if self._on_cuda:
            self._begun[self._sent % 2].record(torch.cuda.current_stream(self._device))

    def send(self, report: Tensor) -> None:
        """Let the device bring a report, float64 [2]; at most one may still be on its way."""
        self._reports[self._sent % 2].copy_(report, non_blocking=True)
        if self._on_cuda:
            self._ended[self._sent % 2].record(torch.cuda.current_stream(self._device))
        self._sent += 1

    def receive(self) -> Chosen:
        """Wait for the oldest report that was not fetched. Raises InputError if its logits were not finite."""
        place, seconds = self._received % 2, 0.0
        if self._on_cuda:
            self._ended[place].synchronize()
            seconds = self._begun[place].elapsed_time(self._ended[place]) / 1000
        self._received += 1
        token_id, logprob = self._reports[place].tolist()
        return Chosen(int(token_id), finite(logprob), seconds)


def reason_against(model: "LanguageModel") -> str | None:
    """Why a step of this model cannot be captured, or None where it can."""
    if model.device.type != _DEVICE:
        return "the model is not on a CUDA device"
    if model.training or model.attention != "sdpa" or not isinstance(model.head, CausalHead):
        return "the model is in training, without a head for tokens, or with another attention than sdpa"
    if is_watched(model):
        return "somebody watches its modules"
    if any(weight.device != model.device for weight in model.parameters()):
        return "the model lies on several devices"
    for name, module in model.named_modules():
        if isinstance(module, Bank | Projection) and not module.capturable:
            return f"{name} needs the host in every step"
    return None
