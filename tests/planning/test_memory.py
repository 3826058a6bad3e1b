"""What connections add to the bytes of a rank: that plan says, that a plan of the residual model leaves out."""

from dataclasses import replace

import pytest

from megatron_fc import FracConfig
from megatron_fc.planning import memory
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.shape import Recompute, Shape, Training

LAYOUT = Layout(
    nodes=1, gpus_per_node=4, tensor=2, pipeline=2, context=1, expert=1, expert_tensor=2, virtual_pipeline=2,
    micro_batch=3, global_batch=48, heads=4, layers=8, experts=4,
)  # fmt: skip
SHAPE = Shape(
    moe_layers=(False, True) * 4, width=64, heads=4, groups=2, head_size=16, ffn=96, vocabulary=1000, sequence=32,
    experts=4, top_k=2, expert_ffn=48,
)  # fmt: skip


@pytest.mark.parametrize("recompute", [Recompute(), Recompute("selective", ("layernorm",)), Recompute("full")], ids=str)
@pytest.mark.parametrize("stage", [0, 1])
def test_activations_of_connections_are_all_that_the_residual_model_has_not(stage: int, recompute: Recompute) -> None:
    training = Training(recompute=recompute, norms_apart=(True,) * 3, fused_connections=False)
    plain = memory.of_stage(SHAPE, training, LAYOUT, stage)
    connected = memory.of_stage(replace(SHAPE, frac=FracConfig(rate=2)), training, LAYOUT, stage)
    assert plain.frac_activations == 0
    assert connected.frac_activations == connected.activations - plain.activations
    assert (connected.frac_activations > 0) == (recompute.granularity != "full")
