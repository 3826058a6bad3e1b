"""What planning says of a run, against Megatron itself: its models, optimizer, saved tensors and own counts."""

from functools import cache
from pathlib import Path

import pytest
import torch
from fake_world import rank_of
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_fc.megatron.parameters import is_frac_parameter
from megatron_fc.megatron.planning import shape_of, training_of
from megatron_fc.megatron.pretrain import model_config
from megatron_fc.megatron.topology import Validated, validate
from megatron_fc.planning import parameters

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("olmoe_7b", "olmoe_1b3", "olmo2_1b")
HERE = ("transformer_impl=local", "no_persist_layer_norm=true", "no_gradient_accumulation_fusion=true")
HERE += ("use_cpu_initialization=true", "no_initialization=true")


@cache
def run(name: str, *overrides: str, nodes: int = 8) -> Validated:
    return validate(CONFIGS / f"{name}.yaml", [*HERE, *overrides], nodes, 8)


def built(run: Validated, rank: int) -> tuple[list[int], int]:
    """Parameters that Megatron builds on a rank, without memory: by model chunk, and those of Frac-Connections."""
    stages = range(run.layout.virtual_pipeline) if run.layout.virtual_pipeline > 1 else [None]
    with rank_of(run.layout, rank), torch.device("meta"):
        config = model_config(run.args, run.recipe)
        builder = config.get_builder_cls()(config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunks = [builder.build_model(groups, vp_stage=stage) for stage in stages]
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    assert all(parameter.is_meta for _, parameter in named)
    frac = sum(parameter.numel() for name, parameter in named if is_frac_parameter(name))
    return [sum(parameter.numel() for parameter in chunk.parameters()) for chunk in chunks], frac


TP2 = ["tensor_model_parallel_size=2", "make_vocab_size_divisible_by=64"]
PP2 = ["pipeline_model_parallel_size=2"]
LAYOUTS = {"TP2": TP2, "PP4": ["pipeline_model_parallel_size=4"], "TP2 PP2": TP2 + PP2}
LAYOUTS["PP2 VPP2"] = [*PP2, "num_virtual_stages_per_pipeline_rank=2"]
EXPERTS = {"EP8": ["expert_model_parallel_size=8"]}
EXPERTS["EP4 ETP2"] = ["expert_model_parallel_size=4", "expert_tensor_parallel_size=2", *TP2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("connection", ["residual", "dfc", "sfc"])
def test_parameters_of_the_model(name: str, connection: str) -> None:
    one = run(name, f"connection={connection}", "expert_model_parallel_size=1")
    counted = parameters.model(shape_of(one))
    assert ([counted.total], counted.frac) == built(one, rank=0)


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in ("olmoe_7b", "olmo2_1b") for layout in LAYOUTS]
    + [("olmoe_7b", layout) for layout in EXPERTS],
)
def test_parameters_of_a_rank_of_every_stage(name: str, layout: str) -> None:
    divided = run(name, *(LAYOUTS | EXPERTS)[layout], nodes=1)
    per_stage = divided.layout.world // divided.layout.pipeline
    for stage in range(divided.layout.pipeline):
        counted = parameters.share_of_stage(shape_of(divided), divided.layout, stage)
        expected = [chunk.total for chunk in counted], sum(chunk.frac for chunk in counted)
        assert expected == built(divided, rank=stage * per_stage), stage
