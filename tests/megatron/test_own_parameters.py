"""Marks of the parameters that connections add; `test_stream.py` has their random values."""

import pytest
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.megatron.slots import NormSlot, Pairing
from megatron_fc.megatron.stack_ends import LeavingNorm
from support import tiny


@pytest.mark.parametrize(
    "connection",
    [FracConfig(rate=4), HyperConfig(slots=4), ManifoldConfig(leave="learned"), ManifoldConfig(slots=4, fractions=4)],
    ids=lambda connection: connection.label,
)
@pytest.mark.parametrize("parallel", [True, False])
def test_gradients_are_summed_under_sequence_parallelism(connection: ConnectionConfig, parallel: bool) -> None:
    """Every rank sees its tokens only: `tests/distributed` has the control without the mark."""
    config = tiny.transformer_config("dense")
    config.sequence_parallel = parallel
    slot = NormSlot(config, tiny.WIDTH, 1e-5, norm=WrappedTorchNorm, connection=connection, pairing=Pairing("norm"))
    parameters = list(slot.connection.parameters())
    if connection.is_wide:
        norm = LeavingNorm(WrappedTorchNorm, connection)(config=config, hidden_size=tiny.WIDTH, eps=1e-5)
        parameters += norm.connection.parameters()
    assert len(parameters) == len(connection.last_dimensions(tiny.WIDTH))
    assert {parameter.sequence_parallel for parameter in parameters} == {parallel}
