"""The parameters that connections add: marks for Megatron's reductions, random values that are theirs alone."""

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_fc import FracConfig, HyperConfig, ManifoldConfig
from megatron_fc.connections.base import ConnectionConfig
from megatron_fc.connections.kinds import is_connection_key
from megatron_fc.megatron.slots import NormSlot, Pairing
from megatron_fc.megatron.stack_ends import LeavingNorm
from support import tiny

LEARNED = ManifoldConfig(slots=4, leave="learned")
FAMILY = pytest.mark.parametrize(
    "connection",
    [FracConfig(rate=4), HyperConfig(slots=4), LEARNED, ManifoldConfig(slots=4, fractions=4)],
    ids=lambda connection: connection.label,
)


@FAMILY
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


@FAMILY
@pytest.mark.parametrize("kind", ["mixed", "hybrid"])
def test_other_weights_start_as_without_connections(connection: ConnectionConfig, kind: str) -> None:
    plain = tiny.build(kind, None).state_dict()
    names = {}
    for key, value in tiny.build(kind, connection).state_dict().items():
        if isinstance(value, torch.Tensor) and not is_connection_key(key):
            names[key.replace("layernorm.norm.", "layernorm.")] = value
    assert names.keys() == {key for key, value in plain.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(value, plain[key]) for key, value in names.items())


def test_every_sub_layer_draws_for_itself_and_the_same_in_either_model() -> None:
    gpt, hybrid = tiny.build("mixed", LEARNED), tiny.build("hybrid", LEARNED)
    drawn = [
        [m.connection.mapping_weight for m in model.modules() if isinstance(m, NormSlot)] for model in (gpt, hybrid)
    ]
    assert len(drawn[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert len({tuple(weight.flatten().tolist()) for weight in drawn[0]}) == 4
    other = tiny.build("mixed", LEARNED, seed=2).decoder.layers[0].input_layernorm.connection
    assert not torch.equal(other.mapping_weight, drawn[0][0])
