"""Which layouts are possible: the same as Megatron's, each refusal with its field, value and what would do."""

import json
import subprocess
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from megatron_fc import UserError
from megatron_fc.planning.layout import Layout
from support import fork_server

MOE = Layout(nodes=8, gpus_per_node=8, expert=8, micro_batch=2, global_batch=1024, heads=16, layers=16, experts=64)


def test_data_parallelism_takes_the_rest() -> None:
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        layout = replace(MOE, nodes=nodes, pipeline=1)
        layout.refuse_impossible()
        assert (layout.data, layout.expert_data, layout.accumulation_steps) == (8 * nodes, nodes, 64 // nodes)
    assert replace(MOE, tensor=2, expert_tensor=1, pipeline=2, context=2).data == 8
    assert replace(MOE, tensor=2, expert_tensor=2, pipeline=2).expert_data == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"nodes": 3, "pipeline": 2},
            "expert_model_parallel_size=8 does not fit 3 nodes of 8 GPUs: 24 ranks are no multiple of PP2 x ETP1 x EP8 "
            "= 16; possible with TP1 PP2 EP8 ETP1: 2, 4, 8, 16, 32, 64, 128 nodes; possible on 3 nodes of 8 GPUs: none",
        ),
        (
            {"nodes": 1, "pipeline": 2},
            "expert_model_parallel_size=8 does not fit 1 node of 8 GPUs: 8 ranks are no multiple of PP2 x ETP1 x EP8 = "
            "16; possible with TP1 PP2 EP8 ETP1: 2, 4, 8, 16, 32, 64, 128 nodes; possible on 1 node of 8 GPUs: "
            "TP1 PP1 EP8 ETP1, TP1 PP2 EP4 ETP1, TP1 PP2 EP2 ETP1, TP1 PP2 EP1 ETP1, ",
        ),
        ({"tensor": 3, "expert_tensor": 1}, "tensor_model_parallel_size=3 does not divide num_attention_heads=16; "),
        ({"pipeline": 3}, "pipeline_model_parallel_size=3 with 1 stages per rank does not divide num_layers=16; "),
        ({"expert": 6}, "expert_model_parallel_size=6 does not divide num_experts=64; "),
        ({"experts": 0}, "expert_model_parallel_size=8 needs experts, and num_experts is not set; "),
        (
            {"nodes": 1, "context": 16},
            "context_parallel_size=16 does not fit 1 node of 8 GPUs: 8 ranks are no multiple",
        ),
        ({"nodes": 3}, "global_batch_size=1024 does not fit 3 nodes of 8 GPUs: it is no multiple of micro_"),
        ({"pipeline": 8, "virtual_pipeline": 2, "global_batch": 96}, "global_batch_size=96 gives each rank 6 micro-"),
    ],
)
def test_refusals(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        replace(MOE, **changes).refuse_impossible()
    assert str(error.value).startswith(sentence)
    assert str(error.value).count("; possible ") == 2


@pytest.mark.parametrize(("name", "field"), [("nodes", "nodes"), ("expert", "expert_model_parallel_size")])
def test_sizes_below_one(name: str, field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}=0 must be at least 1$"):
        replace(MOE, **{name: 0}).refuse_impossible()


def test_everything_listed_is_possible() -> None:
    others = replace(MOE, nodes=1, pipeline=2)._others()
    assert len(others) > 8
    for layout in others:
        layout.refuse_impossible()


# Megatron's own answer for many worlds, in a process of its own, as its groups are global.
MEGATRON = """
import json, sys
import torch.distributed as dist
from megatron_fc.training import cpu_lane
cpu_lane.install()
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore
answers = []
for world, tp, pp, cp, ep, etp in json.load(sys.stdin):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        parallel_state.initialize_model_parallel(
            tp, pp, context_parallel_size=cp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp,
            create_gloo_process_groups=False,
        )
        answers.append([
            parallel_state.get_data_parallel_world_size(), parallel_state.get_expert_data_parallel_world_size()
        ])
    except RuntimeError:
        answers.append(None)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
json.dump(answers, sys.stdout)
"""


def megatron_says(worlds: list[tuple[int, ...]]) -> list[Any]:
    run = subprocess.run(
        [fork_server.python(), "-c", MEGATRON], input=json.dumps(worlds), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return list(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_the_same_worlds_as_megatron() -> None:
    sizes = list(product((4, 6, 8, 24), (1, 2), (1, 2, 3), (1, 2), (1, 2, 4), (1, 2)))
    for (world, tp, pp, cp, ep, etp), answer in zip(sizes, megatron_says(sizes), strict=True):
        layout = replace(
            MOE,
            nodes=1,
            gpus_per_node=world,
            tensor=tp,
            pipeline=pp,
            context=cp,
            expert=ep,
            expert_tensor=etp,
            layers=None,
            micro_batch=1,
            global_batch=24,  # of every data parallel size here
        )
        mine = None
        if layout.problem() is None:
            mine = [layout.data, layout.expert_data]
        assert mine == answer, (world, tp, pp, cp, ep, etp)
