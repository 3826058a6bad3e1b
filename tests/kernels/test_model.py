"""The kernels inside Megatron's layers: as the torch backend, boundary and hand-over included, and their bytes."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_traffic import counted, of

from megatron_fc import FracConfig
from megatron_fc.kernels import launch
from megatron_fc.traffic import streams
from megatron_fc.traffic.counts import total_device
from megatron_fc.traffic.device_counter import DeviceCounter
from megatron_fc.traffic.phase import Whereabouts
from megatron_fc.traffic.streams import Stream

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.megatron import cpu

    cpu.install()
    import rank
    import tiny
    from counted_layers import saved_bytes

TRITON = FracConfig(rate=4, backend="triton")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with rank.one_rank():
        yield


def gradients(kind: str, frac: FracConfig, **options: Any) -> dict[str, torch.Tensor]:
    model = tiny.build(kind, frac, **options)
    tiny.randomise_connections(model)
    loss = tiny.loss(model, tiny.tokens())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launches, in order."""
    made: list[str] = []

    def recorded(name: str) -> Any:
        function = getattr(launch, name)

        def call(*args: Any) -> Any:
            made.append(name)
            return function(*args)

        return call

    for name in ("width_forward", "width_backward", "depth_forward", "depth_backward"):
        monkeypatch.setattr(launch, name, recorded(name))
    for name in ("boundary_forward", "boundary_backward"):
        monkeypatch.setattr(launch, name, recorded(name))
    return made


@pytest.mark.parametrize(("kind", "dynamic"), [("dense", True), ("mixed", False), ("hybrid", True)])
def test_as_the_torch_backend(kind: str, dynamic: bool) -> None:
    frac = replace(TRITON, dynamic=dynamic)
    found, expected = gradients(kind, frac), gradients(kind, replace(frac, backend="torch"))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_attention_and_mlp_of_a_layer_meet_in_one_pass(calls: list[str]) -> None:
    gradients("dense", TRITON)
    layer = ["width_forward", "boundary_forward", "depth_forward"]
    layers = len(calls) // 6
    assert calls[: 3 * layers] == layer * layers
    assert calls[3 * layers :] == ["depth_backward", "boundary_backward", "width_backward"] * layers


def test_full_recompute_with_dropout_is_exact() -> None:
    options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    results = []
    for extra in ({}, options):
        tiny.seed_dropout(3)
        results.append(gradients("dense", TRITON, hidden_dropout=0.1, **extra))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


class Streams(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the streams that our operations read and write."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.seen: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op.namespace == "megatron_fc":
            for tensor in torch.utils._pytree.tree_leaves((args, out)):
                if isinstance(tensor, torch.Tensor) and tensor.numel() == self.elements and tensor.stride(-1) == 1:
                    self.seen[tensor.data_ptr()] = tensor
        return out


LAYERNORM_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}


@pytest.mark.parametrize("frac", [TRITON, replace(TRITON, rate=2), replace(TRITON, dynamic=False)])
@pytest.mark.parametrize(
    ("form", "options"), [(streams.frac_boundary, {}), (streams.frac_pure, LAYERNORM_AGAIN)], ids=["boundary", "pure"]
)
def test_a_layer_moves_what_the_model_says(form: Any, options: dict[str, Any], frac: FracConfig) -> None:
    """All between the sub-layers of a transformer layer."""
    layer = tiny.build("dense", frac, **options).decoder.layers[0]
    width, tokens = layer.config.hidden_size, 32
    h = torch.randn(tokens, 1, width, requires_grad=True)
    mask = torch.ones(1, 1, tokens, tokens).triu(1).bool()
    incoming = torch.randn_like(h)

    def run() -> None:
        out, _ = layer(h, attention_mask=mask)
        out.backward(incoming)

    with Whereabouts(layer) as whereabouts, DeviceCounter(whereabouts) as counter:
        run()
    expected = form(Stream(width, element_bytes=4), frac)
    for phase, traffic in (("forward", expected.forward), ("backward", expected.backward)):
        total = total_device(
            count
            for key, count in counter.counts.items()
            if key.phase == phase and not key.module.startswith(("self_attention", "mlp"))
        )
        assert total.read_bytes == pytest.approx(traffic.read_bytes(tokens), rel=0.01)
        assert total.written_bytes == pytest.approx(traffic.written_bytes(tokens), rel=0.01)
    if not options:  # recompute frees streams, whose addresses say nothing then
        # The loads and stores of the kernels, one by one.
        with Streams(tokens * width) as ours, counted() as moved:
            run()
        assert of(moved, *ours.seen.values()) == 22 * tokens * width * 4
        assert saved_bytes(layer, h) == pytest.approx(tokens * expected.saved_bytes_per_token, rel=0.01)
