"""Names of process groups: every group that Megatron makes has one."""

import inspect
import re

import pytest
from megatron.core import parallel_state

import rank
from megatron_fc.profiling import groups

# Weight shards and sizes of a step's own choice, which Frac-Connections are not trained with.
UNNAMED = {"GTP_WEIGHT_REMAT_GROUP", "EXPERT_GTP_WEIGHT_REMAT_GROUP"}


def test_every_description_in_megatron_has_a_name() -> None:
    described = set(re.findall(r"""group_desc=["']([A-Z_]+)["']""", inspect.getsource(parallel_state)))
    assert "TENSOR_MODEL_PARALLEL_GROUP" in described
    unknown = {text for text in described if groups._VARIANT.sub("", text) not in groups._KINDS}
    # All ranks of an instance of the distributed optimizer: the world, where there is one.
    assert unknown - UNNAMED - {"INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"} == set()


@pytest.mark.parametrize(
    ("description", "kinds"),
    [
        ("DATA_PARALLEL_GROUP_WITH_CP_GLOO", "dp-cp"),
        ("DATA_PARALLEL_GROUP_WITH_CP_AG", "dp-cp"),
        ("INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO", "dp-cp"),
        ("HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_GLOO_L1", "expert_dp"),
        ("HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L0", "cp"),
        ("DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT", "dp-cp"),
        ("EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP", "etp-ep-pp"),
    ],
)
def test_copies_and_parts_share_a_name(description: str, kinds: str) -> None:
    assert groups._KINDS[groups._VARIANT.sub("", description)] == kinds


def test_groups_of_one_rank_have_no_name() -> None:
    with rank.one_rank():
        assert parallel_state.get_tensor_model_parallel_group().size() == 1
        assert groups.group_names() == {}
