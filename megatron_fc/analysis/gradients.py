"""`megatron-fc analyze gradients`: the norm of each layer's gradient on validation data.

The other side of the paper's argument: with plain residuals either gradients vanish (norms behind the sum) or
representations collapse (norms before the sub-layer).
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from megatron_fc.analysis.observed import gathered
from megatron_fc.analysis.source import Source, opened
from megatron_fc.analysis.values import facts_of
from megatron_fc.compress.session import Session
from megatron_fc.connections.kinds import is_connection_key

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
Squares = dict[tuple[int, str], float]


def analyze_gradients(source: Source) -> dict[str, Any] | None:
    """Return gradient norms of weights and of connections per layer; every rank calls it, on the first they are given.

    The loss is that of the next token alone, its mean over all tokens, without dropout and without routers' losses.

    Raises:
        UserError: the checkpoint is not that of the recipe, or the recipe cannot be run so.
    """
    with opened(source) as run:
        chunk = _backward(run)
        parts = gathered(dict(_squares(chunk)))
        tokens = run.args.eval_global_batch_size * run.args.seq_length
    if parts is None:
        return None
    total: Squares = defaultdict(float)
    for part in parts:
        for key, square in part.items():
            total[key] += square
    layers = sorted({layer for layer, _ in total if layer > 0})
    return {
        **facts_of(source, tokens),
        "layers": [
            {"layer": layer, **{what: total[layer, what] ** 0.5 for what in ("weights", "connections")}}
            for layer in layers
        ],
        "ends": sum(square for (layer, _), square in total.items() if layer == 0) ** 0.5,
        "all": sum(total.values()) ** 0.5,
    }


def _backward(run: Session) -> Any:
    """Forward and backward of the validation batch, gradients reduced as in training; returns the wrapped chunk."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.core.utils import get_model_config

    from megatron_fc.training.batches import forward_step

    [chunk] = run.chunks
    config = get_model_config(chunk)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk)
    wrapped.zero_grad_buffer()
    wrapped.eval()  # which leaves out dropout and the routers' losses
    config.finalize_model_grads_func = finalize_model_grads
    get_rerun_state_machine().set_mode(RerunMode.DISABLED)
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=run.batches(),
        model=[wrapped],
        num_microbatches=run.micro_batches,
        seq_length=run.args.seq_length,
        micro_batch_size=run.args.eval_micro_batch_size,
        forward_only=False,
    )
    return wrapped


def _squares(wrapped: Any) -> Iterator[tuple[tuple[int, str], float]]:
    """Squared norms by layer, 0 for what is in none, of what this rank alone counts of the gradient."""
    from megatron.core.utils import unwrap_model

    model = unwrap_model(wrapped)
    total: Squares = defaultdict(float)
    for name, parameter in model.named_parameters():
        if not _counts_here(parameter):
            continue
        match = _LAYER.match(name)
        layer = model.decoder.layers[int(match[1])].layer_number if match else 0
        what = "connections" if is_connection_key(name) else "weights"
        total[layer, what] += float(parameter.main_grad.double().square().sum())
    yield from total.items()


def _counts_here(parameter: Any) -> bool:
    """Of the replicas of a gradient one counts: of data parallelism, and of what tensor parallelism does not divide."""
    from megatron.core import parallel_state

    if getattr(parameter, "shared", False):  # a copy of the embedding on the last pipeline stage
        return False
    if getattr(parameter, "allreduce", True):
        replica, tensor = parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    else:  # of an expert
        replica = parallel_state.get_expert_data_parallel_rank()
        tensor = parallel_state.get_expert_tensor_parallel_rank()
    return replica == 0 and (tensor == 0 or getattr(parameter, "tensor_model_parallel", False))
