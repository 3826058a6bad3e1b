"""Groups and nodes of a rank, against Megatron's own generator of groups."""

from itertools import combinations, product

import pytest
from megatron.core.parallel_state import RankGenerator

import support.cpu_megatron  # noqa: F401
from megatron_fc.planning.layout import Layout
from megatron_fc.planning.placement import Placement

ORDER = "tp-cp-ep-dp-pp"


def layout(**sizes: int) -> Layout:
    defaults = {"nodes": 4, "gpus_per_node": 8, "virtual_pipeline": 1, "micro_batch": 1, "global_batch": 64}
    parallel = dict.fromkeys(("tensor", "pipeline", "context", "expert", "expert_tensor"), 1)
    return Layout(**(defaults | parallel | sizes), heads=8, layers=8, experts=8)


LAYOUTS = [
    layout(tensor=tensor, pipeline=pipeline, context=context, expert=expert, expert_tensor=expert_tensor)
    for tensor, pipeline, context, expert, expert_tensor in product((1, 2), (1, 2), (1, 4), (1, 4), (1, 2))
]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_the_next_rank_is_that_of_megatron(sizes: Layout) -> None:
    dense = RankGenerator(sizes.tensor, 1, sizes.data, sizes.pipeline, sizes.context, ORDER)
    experts = RankGenerator(sizes.expert_tensor, sizes.expert, sizes.expert_data, sizes.pipeline, 1, ORDER)
    ours = {"tp": "etp", "dp": "expert_dp"}
    for generator, kinds in ((dense, ("tp", "cp", "dp", "pp")), (experts, ("tp", "ep", "dp", "pp"))):
        for chosen in (chosen for count in (1, 2, 3) for chosen in combinations(kinds, count)):
            names = [ours.get(kind, kind) for kind in chosen] if generator is experts else chosen
            for group in generator.get_ranks("-".join(chosen)):
                for place, rank in enumerate(group):
                    at = Placement(sizes, rank)
                    assert at.size("-".join(names)) == len(group)
                    assert at.following("-".join(names)) == group[(place + 1) % len(group)]
                    if len(names) == 1:
                        assert at.coordinate(names[0]) == place
                        assert [at.peer(names[0], peer) for peer in range(len(group))] == group


def test_groups_are_named_by_kinds_of_more_than_one_rank() -> None:
    at = Placement(layout(tensor=2), 0)
    assert (at.name("dp-cp"), at.name("tp-pp"), at.name("tp-dp-cp"), at.name("cp")) == ("dp", "tp", "tp-dp", "")


def test_ranks_fill_one_node_after_the_other() -> None:
    at = Placement(layout(), 9)
    assert [rank for rank in range(32) if at.is_on_this_node(rank)] == list(range(8, 16))
