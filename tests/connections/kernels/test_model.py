"""The kernels inside Megatron's layers: as the torch backend, boundary and hand-over included, and their bytes."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from laboratory.emulator import Options
from laboratory.emulator.driver import Emulator, emulated
from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.costs import eager_traffic, traffic
from megatron_fc.connections.costs.traffic import Stream
from megatron_fc.connections.kernels import launch
from megatron_fc.planning.counts import total_device
from megatron_fc.profiling.counters.device import DeviceCounter
from megatron_fc.profiling.counters.phase import Whereabouts
from support.kernel_traffic import counted, of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron_fc.training import cpu_lane

    cpu_lane.install()
    from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import RegisterFSDPBackwardFunction

    import rank
    from counted_layers import saved_bytes
    from support import tiny

pytestmark = pytest.mark.slow
TRITON = FracConfig(rate=4, backend="triton")
WIDE = HyperConfig(slots=4, backend="triton")
MANIFOLD = ManifoldConfig(slots=4, backend="triton")
TOKENS = tiny.tokens(batch=1)
FEW = TOKENS[:, :6]  # two tiles of rows, of which one is not full


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[Emulator]:
    with rank.one_rank(), emulated(90, Options(uninitialised="error")) as emulator:
        yield emulator


def gradients(
    kind: str, frac: ConnectionConfig, steps: int = 1, tokens: torch.Tensor = TOKENS, **options: Any
) -> list[dict[str, torch.Tensor]]:
    """Of steps on the same tokens: from the second, layers know which one comes next."""
    model = tiny.build(kind, frac, **options)
    tiny.randomise_connections(model)
    results = []
    for _ in range(steps):
        model.zero_grad()
        tiny.seed_dropout(3)
        loss = tiny.loss(model, tokens)
        loss.backward()
        results.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    return results


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


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


@pytest.mark.parametrize(
    ("kind", "frac", "meetings"),
    [
        ("dense", TRITON, (1, 3)),
        ("mixed", replace(TRITON, dynamic=False), (1, 3)),
        ("hybrid", TRITON, (0, 3)),
        ("dense", WIDE, (1, 3)),
    ],
)
def test_as_the_torch_backend(
    kind: str, frac: FracConfig | HyperConfig, meetings: tuple[int, int], calls: list[str]
) -> None:
    """Of the four sites in a row those of one layer meet, which in a hybrid model has one; then those of two layers.

    A meeting changes roundings in fp32, and nothing else.
    """
    [expected] = gradients(kind, replace(frac, backend="torch"))
    first, second = gradients(kind, frac, steps=2)
    assert calls == launches(meetings[0]) + launches(meetings[1])
    assert first.keys() == expected.keys()
    for name in first:
        # Measured 9e-7: a boundary's sums are compiled in another order than those of its two parts.
        assert (second[name] - first[name]).abs().max() <= 3e-6 * first[name].abs().max()
        torch.testing.assert_close(first[name], expected[name], rtol=1e-3, atol=1e-5)


def launches(meetings: int) -> list[str]:
    """Of a step with four sites, where after one that meets none before it so many meet the one before them."""
    forward = ["width_forward"] + ["boundary_forward"] * meetings + ["depth_forward"]
    backward = ["depth_backward"] + ["boundary_backward"] * meetings + ["width_backward"]
    groups = 4 // (meetings + 1)
    return forward * groups + backward * groups


def test_layers_captured_one_by_one_do_not_meet(calls: list[str]) -> None:
    """Before the capture they run as others do, and could learn what comes next."""
    model = tiny.build("dense", TRITON, cuda_graph_impl="transformer_engine")
    for _ in range(2):
        tiny.loss(model, FEW)
    assert calls == launches(1)[:6] * 2


def test_layers_that_megatron_fsdp_shards_do_not_meet(calls: list[str]) -> None:
    """What it does to a unit's inputs; whose parameters are gathered later than the layer before runs."""
    model = tiny.build("dense", TRITON)

    def as_a_unit(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        [stream] = RegisterFSDPBackwardFunction.apply(lambda: None, kwargs["hidden_states"])
        return args, kwargs | {"hidden_states": stream}

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(as_a_unit, with_kwargs=True)
    for _ in range(2):
        tiny.loss(model, FEW)
    assert calls == launches(1)[:6] * 2


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("uniform", 1),
        ("uniform", 2),
        ("block", 1),
    ],
)
def test_full_recompute_with_dropout_is_exact(method: str, layers: int) -> None:
    """In the second step, too: the layers of one recomputed region meet, a recomputed and another layer do not."""
    options = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    apart, met = gradients("dense", TRITON, steps=2, tokens=FEW, hidden_dropout=0.1)
    first, second = gradients("dense", TRITON, steps=2, tokens=FEW, hidden_dropout=0.1, **options)
    assert same(first, apart)
    assert same(second, met if layers == 2 else apart)


def test_recompute_of_the_stream_is_exact(calls: list[str]) -> None:
    """Streams are computed again by depth connections alone, from coefficients that are kept."""
    [apart] = gradients("dense", WIDE, tokens=FEW)
    calls.clear()
    layers = [gradients("dense", replace(WIDE, stream_layers=count), tokens=FEW)[0] for count in (1, 2)]
    assert same(*layers)
    for name in apart:
        torch.testing.assert_close(layers[0][name], apart[name], rtol=1e-3, atol=1e-5)
    # Of the four sites one follows in each of two groups, or three in one.
    assert calls.count("width_forward") == 4 + 4
    assert calls.count("depth_forward") == (4 + 2) + (4 + 3)


class Streams(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the streams that our operations read and write."""

    def __init__(self, *elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.seen: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op.namespace == "megatron_fc":
            for tensor in torch.utils._pytree.tree_leaves((args, out)):
                if isinstance(tensor, torch.Tensor) and tensor.numel() in self.elements and tensor.stride(-1) == 1:
                    self.seen[tensor.data_ptr()] = tensor
        return out


LAYERNORM_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}


@pytest.mark.parametrize(
    ("connection", "form", "options"),
    [
        pytest.param(TRITON, traffic.layer_alone, {}, id="dfc"),
        pytest.param(TRITON, traffic.layer_pure, LAYERNORM_AGAIN, id="dfc pure", marks=pytest.mark.soak),
        pytest.param(replace(TRITON, dynamic=False), traffic.layer_alone, {}, id="sfc"),
        pytest.param(replace(TRITON, dynamic=False), traffic.layer_pure, LAYERNORM_AGAIN, id="sfc pure"),
        pytest.param(WIDE, traffic.layer_alone, {}, id="dhc"),
        pytest.param(MANIFOLD, eager_traffic.mixing_kernels, {}, id="mhc"),
        pytest.param(replace(TRITON, rate=2), traffic.layer_alone, {}, id="dfc_x2", marks=pytest.mark.soak),
        pytest.param(
            replace(TRITON, rate=2), traffic.layer_pure, LAYERNORM_AGAIN, id="dfc_x2 pure", marks=pytest.mark.soak
        ),
    ],
)
def test_a_layer_moves_what_the_model_says(
    emulator: Emulator, connection: ConnectionConfig, form: Any, options: dict[str, Any]
) -> None:
    """All between the sub-layers of a transformer layer."""
    layer = tiny.build("dense", connection, **options).decoder.layers[1]  # the first one also enters the stream
    width, tokens, wide = layer.config.hidden_size, 16, connection.stream_width(layer.config.hidden_size)
    h = torch.randn(tokens, 1, wide, requires_grad=True)
    mask = torch.ones(1, 1, tokens, tokens).triu(1).bool()
    incoming = torch.randn_like(h)

    def run() -> None:
        out, _ = layer(h, attention_mask=mask)
        out.backward(incoming)

    with Whereabouts(layer) as whereabouts, DeviceCounter(whereabouts) as counter:
        run()
    expected = form(Stream(width, element_bytes=4), connection)
    for phase, moves in (("forward", expected.forward), ("backward", expected.backward)):
        total = total_device(
            count
            for key, count in counter.counts.items()
            if key.phase == phase and not key.module.startswith(("self_attention", "mlp"))
        )
        assert total.read_bytes == pytest.approx(moves.read_bytes(tokens), rel=0.01)
        assert total.written_bytes == pytest.approx(moves.written_bytes(tokens), rel=0.01)
    if not options:  # recompute frees streams, whose addresses say nothing then
        # The loads and stores of the kernels, one by one.
        with Streams(tokens * width, tokens * wide) as ours, counted(emulator) as moved:
            run()
        # width, boundary, depth; without a boundary width and depth twice
        rows = 12 * (wide // width) + 10 if form is traffic.layer_alone else 14 * (wide // width) + 10
        assert of(moved, *ours.seen.values()) == rows * tokens * width * 4
        assert saved_bytes(layer, h) == pytest.approx(tokens * expected.saved_bytes_per_token, rel=0.01)


def test_two_layers_that_meet_move_two_rows_less_than_two_alone(emulator: Emulator) -> None:
    decoder = tiny.build("dense", TRITON).decoder
    width, tokens = decoder.config.hidden_size, 16
    mask = torch.ones(1, 1, tokens, tokens).triu(1).bool()

    def run() -> None:
        h = torch.randn(tokens, 1, width, requires_grad=True)
        decoder(hidden_states=h, attention_mask=mask).sum().backward()

    run()
    with Streams(tokens * width) as ours, counted(emulator) as moved:
        run()
    assert of(moved, *ours.seen.values()) == (22 + 20) * tokens * width * 4


def test_launches_of_layers_against_stock(emulator: Emulator) -> None:
    """Of two layers in a row, all between the sub-layers: kernels, and operations of torch that move bytes."""

    def run(connection: ConnectionConfig | None) -> dict[str, int]:
        decoder = tiny.build("dense", connection).decoder
        h = torch.randn(16, 1, decoder.config.hidden_size, requires_grad=True)
        mask = torch.ones(1, 1, 16, 16).triu(1).bool()

        def step() -> None:
            decoder(hidden_states=h, attention_mask=mask).backward(torch.ones_like(h))

        step()  # layers learn what comes next
        emulator.launches.clear()
        with Whereabouts(decoder) as whereabouts, DeviceCounter(whereabouts) as counter:
            step()
        made = {"forward": 0, "backward": 0, "accumulation": 0}
        norms = set()
        for key, count in counter.counts.items():
            if not key.module.startswith("layers") or {"self_attention", "mlp"} & set(key.module.split(".")):
                continue
            if key.op == "aten.add_":
                made["accumulation"] += count.calls
            elif key.module.endswith("layernorm"):  # many operations on a CPU, a kernel on a GPU
                norms.add((key.phase, key.module))
            elif not key.op.startswith("megatron_fc"):
                made[key.phase] += count.calls
        for phase, _ in norms:  # in backward with the sum of the stream's two gradients
            made[phase] += 1 if phase == "forward" else 2
        for name, _ in emulator.launches:
            made["backward" if name.startswith(("width_b", "depth_b", "main_b", "reduce")) else "forward"] += 1
        return made

    # Norm and sum, twice per layer.
    stock = run(None)
    assert (stock["forward"], stock["backward"]) == (8, 8)
    # Width, three boundaries, depth; backward of depth one, of the others two. Gradients of 7 parameters and a norm's.
    assert run(TRITON) == {"forward": 5, "backward": 9, "accumulation": 4 * 8}
