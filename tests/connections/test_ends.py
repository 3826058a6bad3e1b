"""Entering a stream and leaving it: which slot gets which fraction, and what the last norm takes."""

import pytest
import torch

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig, UserError
from megatron_fc.connections import ends
from megatron_fc.connections.reference import Config
from support.family import name

D, C = 12, 4
BETWEEN = HyperConfig(slots=6, fractions=3)


@pytest.mark.parametrize("config", [FracConfig(rate=4), ManifoldConfig(slots=4, fractions=4)], ids=name)
def test_fractions_are_the_slots(config: Config) -> None:
    h = torch.randn(2, 5, D)
    assert ends.enter(h, config) is h
    assert config.build_leave(D)(h) is h


def test_slots_take_fractions_in_turns() -> None:
    h = torch.randn(2, 5, D)
    stream = ends.enter(h, BETWEEN)
    for j, slot in enumerate(stream.split(C, dim=-1)):
        assert torch.equal(slot, h.split(C, dim=-1)[j % 3])


def test_a_fraction_is_the_mean_of_its_slots() -> None:
    stream = torch.randn(2, 5, 6 * C)
    slots = stream.split(C, dim=-1)
    expected = torch.cat([(slots[i] + slots[i + 3]) / 2 for i in range(3)], dim=-1)
    torch.testing.assert_close(ends.mean(stream, BETWEEN), expected)
    torch.testing.assert_close(BETWEEN.build_leave(D)(stream), expected)
    assert not list(BETWEEN.build_leave(D).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [BETWEEN, HyperConfig(slots=2), HyperConfig(slots=4), ManifoldConfig()], ids=name)
def test_what_entered_leaves_to_the_bit(config: Config, dtype: torch.dtype) -> None:
    h = torch.randn(50, D).to(dtype)
    assert torch.equal(ends.mean(ends.enter(h, config), config), h)


def test_the_learned_leave_belongs_to_the_network() -> None:
    config = ManifoldConfig(slots=4, leave="learned")
    with pytest.raises(UserError, match=r"belongs to the network, not to a site: use config.build_leave\(\)"):
        config.build(D).leave(torch.randn(2, 4 * D))  # type: ignore[attr-defined]
    torch.manual_seed(0)
    leave = config.build_leave(D).bfloat16()
    assert {p.dtype for p in leave.parameters()} == {torch.float32}
    assert leave(torch.randn(3, 4 * D).bfloat16()).dtype == torch.bfloat16
    h = torch.randn(50, D)
    # sigmoid(0) = 1/2 of each of four equal streams, which the last norm takes back; the scale is 0.01.
    torch.testing.assert_close(leave(ends.enter(h, config)), 2 * h, rtol=0.05, atol=0)


@pytest.mark.parametrize("n", [2, 4])
def test_a_learned_leave_starts_as_the_residual_networks(n: int) -> None:
    config = ManifoldConfig(slots=n, leave="learned")
    leave = config.build_leave(D)
    assert not config.is_identity("leave_scale", leave.get_parameter("leave_scale"))
    leave.start_as_residual()  # type: ignore[operator]
    assert all(config.is_identity(key, p) for key, p in leave.named_parameters())
    h = torch.randn(50, D)
    torch.testing.assert_close(leave(ends.enter(h, config)), h, rtol=1e-5, atol=0)


def test_the_learned_leaves_gradients() -> None:
    leave = ManifoldConfig(slots=3, leave="learned").build_leave(4).double()
    torch.nn.init.normal_(leave.get_parameter("leave_bias"))
    h = torch.randn(2, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, *_: leave(h), (h, *leave.parameters()))
