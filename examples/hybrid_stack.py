"""A HybridModel whose attention, MLP and MoE layers are connected by Hyper-Connections of two streams.

    python examples/hybrid_stack.py

`hybrid_stack` is Megatron's stack spec where Transformer Engine is installed, and one of Megatron's local layers where
it is not; your own stack spec goes in its place. You should see a connection per layer of the pattern, and a falling
loss:

    layers   * - * E
    dhc_x2   4 connections, stream of 128 values, hidden size 64
    loss     5.57... -> ...
"""

from one_process import SEQUENCE, VOCABULARY, losses, one_process, small_config  # before Megatron

# isort: split

from megatron.core.models.hybrid.hybrid_model import HybridModel

from megatron_fc import HyperConfig
from megatron_fc.connections.site import Site
from megatron_fc.megatron.hybrid import hybrid_stack
from megatron_fc.megatron.output_projections import scale_output_projections
from megatron_fc.megatron.specs import connect

PATTERN = "*-*E"


def main() -> None:
    connection = HyperConfig(slots=2)
    config = small_config(
        num_layers=len(PATTERN),
        is_hybrid_model=True,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
    )
    scale_output_projections(config, connection)  # the paper's start of Hyper-Connections
    stack = connect(hybrid_stack(), connection)
    model = HybridModel(
        config, stack, VOCABULARY, SEQUENCE, hybrid_layer_pattern=PATTERN, position_embedding_type="rope"
    )
    sites = [module for module in model.modules() if isinstance(module, Site)]
    print("layers  ", *PATTERN)
    width = connection.stream_width(config.hidden_size)
    print(f"{connection.label}   {len(sites)} connections, stream of {width} values, hidden size {config.hidden_size}")
    first, *_, last = losses(model, steps=10)
    print(f"loss     {first:.4f} -> {last:.4f}")


if __name__ == "__main__":
    with one_process():
        main()
