"""Your own GPTModel with Frac-Connections: `connect` takes the layer spec that you have, and returns another.

    python examples/own_gpt_model.py

You should see the same first loss twice, since a connected model starts as the plain one. Then the two part:

    plain    parameters 229,952  loss 5.56... -> ...
    dfc_x4   parameters 231,536 (+1,584)  loss 5.56... -> ...
"""

from one_process import SEQUENCE, VOCABULARY, losses, one_process, small_config  # before Megatron

# isort: split

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_fc import FracConfig
from megatron_fc.megatron.specs import connect


def build(connection: FracConfig | None) -> GPTModel:
    config = small_config()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")  # yours; Transformer Engine's will do as well
    if connection is not None:
        spec = connect(spec, connection)
    return GPTModel(config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope")


def main() -> None:
    plain, connected = build(None), build(FracConfig(rate=4))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (plain, connected)]
    first, *_, last = losses(plain, steps=10)
    print(f"plain    parameters {sizes[0]:,}  loss {first:.4f} -> {last:.4f}")
    first, *_, last = losses(connected, steps=10)
    print(f"dfc_x4   parameters {sizes[1]:,} (+{sizes[1] - sizes[0]:,})  loss {first:.4f} -> {last:.4f}")


if __name__ == "__main__":
    with one_process():
        main()
