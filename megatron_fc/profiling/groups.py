"""Names of Megatron's process groups in traffic reports."""

import re

from megatron.core import parallel_state
from torch.distributed import ProcessGroup

# As Megatron describes a group when it makes it, and the kinds of parallelism that it spans.
_KINDS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp-cp",
    "EXPERT_DATA_PARALLEL_GROUP": "expert_dp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp-cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tp-dp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp-dp-cp",
    "MODEL_PARALLEL_GROUP": "tp-pp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "etp-ep",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "etp-ep-pp",
    "EMBEDDING_GROUP": "embedding",
    "POSITION_EMBEDDING_GROUP": "embedding",
}
# Copies for another backend or to overlap, parts of a hierarchy, and groups that also span its weight shards.
_VARIANT = re.compile(r"^(HIERARCHICAL|INTRA_PARTIAL)_|_GLOO|_AG$|_L\d+$|_WITH_E?GTP(_REMAT)?")


def group_names() -> dict[ProcessGroup, str]:
    """Names of the groups of this rank, once Megatron's parallel state is there.

    A group that spans several kinds of parallelism is called by those that have more than one rank: `dp-cp` without
    context parallelism is `dp`. Copies of a group, for another backend or to overlap, share its name. The first and
    last stages that hold the embeddings are `embedding`.
    """
    sizes = {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
        "expert_dp": parallel_state.get_expert_data_parallel_world_size(),
        "embedding": 2,
    }
    names = {}
    for group in parallel_state._global_process_group_list or ():
        kinds = _KINDS.get(_VARIANT.sub("", group.group_desc)) if group is not None else None
        if kinds is not None and group.size() > 1:
            names[group] = "-".join(kind for kind in kinds.split("-") if sizes[kind] > 1)
    # A group of two pipeline stages may be that of the embeddings too: whoever looks for a pair finds stages first.
    return dict(sorted(names.items(), key=lambda item: item[1] == "embedding"))
