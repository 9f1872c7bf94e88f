"""The recurrent layers with all their CUDA kernels against transformers' one pass, on every split, and with padding."""

from itertools import pairwise

import pytest
import torch
from gpu_paths import needs_card, needs_triton
from transformers import FalconMambaConfig as TheirFalconMambaConfig
from transformers import RecurrentGemmaConfig as TheirRecurrentGemmaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from lmx.core.call import Inputs
from lmx.core.gpu import recurrent
from lmx.core.layers.padding import Compaction
from lmx.core.loader import build
from lmx.core.state import State

HIDDEN, LENGTH = 16, 19
FALCON_MAMBA = {
    "model_type": "falcon_mamba",
    **{"vocab_size": 8, "hidden_size": HIDDEN, "num_hidden_layers": 1},
    **{"intermediate_size": 32, "state_size": 2, "time_step_rank": 3},
}
RECURRENT_GEMMA = {
    "model_type": "recurrent_gemma",
    **{"vocab_size": 8, "hidden_size": HIDDEN, "num_hidden_layers": 1, "intermediate_size": 8},
    **{"lru_width": 16, "num_attention_heads": 1, "block_types": ["recurrent"], "attention_window_size": 8},
}
CUTS = [[0, LENGTH], [0, 1, 2, 7, LENGTH], [0, 16, 17, 18, LENGTH]]


@pytest.fixture
def calls(monkeypatch):
    """How often each function of the kernels was called."""
    counts = {}

    def count(name):
        function = getattr(recurrent, name)

        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(recurrent, name, counted)

    for name in ("convolve", "gated_scan", "recur", "recur_step"):
        count(name)
    return counts


def falcon_mamba(device):
    torch.manual_seed(0)
    decoder = build(FALCON_MAMBA).eval().to(device).decoder
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mixer = decoder.blocks[0].mixer
    sizes = {name: value for name, value in FALCON_MAMBA.items() if name != "model_type"}
    theirs = FalconMambaMixer(TheirFalconMambaConfig(**sizes), 0, initialize_mixer_weights=False).eval()
    ours = {**mixer.state_dict(), "conv1d.weight": mixer.conv_weight, "conv1d.bias": mixer.conv_bias}
    theirs.load_state_dict({name: ours[name] for name in theirs.state_dict()})
    return mixer, theirs


def recurrent_gemma(device):
    torch.manual_seed(1)
    decoder = build(RECURRENT_GEMMA).eval().to(device).decoder
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    block = decoder.blocks[0].temporal
    sizes = {name: value for name, value in RECURRENT_GEMMA.items() if name != "model_type"}
    theirs = RecurrentGemmaRecurrentBlock(TheirRecurrentGemmaConfig(**sizes), 0).eval()
    ours = {**block.state_dict(), "conv_1d.weight": block.conv_weight, "conv_1d.bias": block.conv_bias}
    theirs.load_state_dict({name: ours[name].reshape(theirs.state_dict()[name].shape) for name in theirs.state_dict()})
    return decoder, theirs


def hidden_states(batch, device):
    return torch.randn(batch, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(2)).to(device)


@torch.no_grad()
def test_falcon_mambas_mixer_is_transformers_on_every_split(calls, device):
    """transformers' cached continuation starts the scan from zeros (5.23), so its one pass is the yardstick."""
    mixer, theirs = falcon_mamba(device)
    x = hidden_states(2, device)
    expected = theirs(x.cpu())
    for cuts in CUTS:
        state = mixer.empty_state(2, torch.float32, x.device)
        places = [buffer.data_ptr() for buffer in state.buffers]
        y = torch.cat([mixer(x[:, start:stop], None, state) for start, stop in pairwise(cuts)], 1)
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-5)
        assert [buffer.data_ptr() for buffer in state.buffers] == places
    assert calls == {"convolve": 9, "gated_scan": 9}


@torch.no_grad()
def test_recurrent_gemmas_block_is_transformers_on_every_split(calls, device):
    """transformers pads its continuation with zeros (5.23), so its one pass is the yardstick."""
    decoder, theirs = recurrent_gemma(device)
    block, x = decoder.blocks[0].temporal, hidden_states(2, device)
    expected, _ = theirs(x.cpu(), torch.arange(LENGTH)[None].expand(2, -1), None, use_cache=False)
    for cuts in CUTS:
        state = State("recurrent_gemma", decoder.empty_layers(2, torch.float32, x.device), 2)
        places = [buffer.data_ptr() for buffer in state.layers[0].buffers]
        pieces = []
        for start, stop in pairwise(cuts):
            span = state.span(stop - start, None)
            call = decoder.plan(Inputs(x[:, start:stop], None, None, "sdpa"), span, state)
            pieces.append(block(x[:, start:stop], call, state.layers[0]))
            state.advance(span)
        torch.testing.assert_close(torch.cat(pieces, 1).cpu(), expected, rtol=1e-4, atol=1e-5)
        assert [buffer.data_ptr() for buffer in state.layers[0].buffers] == places
    assert calls == {"convolve": 9, "recur": 4, "recur_step": 5}


@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(device):
    mixer, theirs = falcon_mamba(device)
    x = hidden_states(2, device)
    mask = torch.ones(2, LENGTH, dtype=torch.bool, device=x.device)
    mask[0, :3] = mask[1, 4:6] = mask[1, -1] = False
    state = mixer.empty_state(2, torch.float32, x.device)
    y = mixer(x, Compaction.of(mask), state)
    for row in range(2):
        alone = x[row, mask[row]][None]
        torch.testing.assert_close(y[row, mask[row]].cpu(), theirs(alone.cpu())[0], rtol=1e-4, atol=1e-5)
        fresh = mixer.empty_state(1, torch.float32, x.device)
        mixer(alone, None, fresh)
        for together, apart in zip(state.buffers, fresh.buffers, strict=True):
            torch.testing.assert_close(together[row], apart[0], rtol=1e-5, atol=1e-6)


def test_gradients_are_transformers(device):
    mixer, theirs = falcon_mamba(device)
    x = hidden_states(1, device)[:, :6]
    names = [name for name, _ in mixer.named_parameters() if not name.startswith("conv")]
    ours = torch.autograd.grad(mixer(x, None, None).square().sum(), [mixer.get_parameter(name) for name in names])
    expected = torch.autograd.grad(theirs(x.cpu()).square().sum(), [theirs.get_parameter(name) for name in names])
    for got, gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.cpu(), gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@needs_triton
@needs_card
@pytest.mark.cuda
@pytest.mark.parametrize("family", ["falcon_mamba", "recurrent_gemma"])
@torch.no_grad()
def test_a_step_waits_for_nothing_and_fits_a_graph(family):
    place = torch.device("cuda")
    x = hidden_states(2, place)[:, :1].clone()
    if family == "falcon_mamba":
        layer, _ = falcon_mamba(place)
        state, others = layer.empty_state(2, torch.float32, place), (None,)
    else:
        decoder, _ = recurrent_gemma(place)
        layer, whole = decoder.blocks[0].temporal, State(family, decoder.empty_layers(2, torch.float32, place), 2, 1)
        state = whole.layers[0]
        others = (decoder.plan(Inputs(x, None, None, "sdpa"), whole.span(1, None), whole),)
    layer(x, *others, state)  # compiles
    expected_state = type(state).restore({name: tensor.clone() for name, tensor in state.tensors(1).items()})
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [layer(x * scale, *others, expected_state) for scale in (1, 2, 3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first = [buffer.clone() for buffer in state.buffers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, *others, state)
    for buffer, value in zip(state.buffers, first, strict=True):
        buffer.copy_(value)
    tokens = x.clone()
    for scale, answer in zip((1, 2, 3), expected, strict=True):
        x.copy_(tokens * scale)
        graph.replay()
        assert torch.equal(y, answer)
    for ours, eager in zip(state.buffers, expected_state.buffers, strict=True):
        assert torch.equal(ours, eager)
