"""The quantisation recipes: ModelOpt's own, with Frac-Connections and norms left out."""

import copy
from typing import Any

import torch

from megatron_fc.checkpoints.modelopt_state import UNQUANTIZED
from megatron_fc.errors import UserError
from megatron_fc.training import cpu_lane

RECIPES = {
    "fp8": "FP8_DEFAULT_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
_NVFP4_CAPABILITY = (8, 9)


def refuse_unavailable(recipe: str) -> None:
    """Check that this machine can compute a recipe.

    Raises:
        UserError: it cannot.
    """
    if recipe != "nvfp4":
        return
    capability = (0, 0) if cpu_lane.needed() else torch.cuda.get_device_capability()
    if capability < _NVFP4_CAPABILITY:
        here = "has no CUDA device" if cpu_lane.needed() else f"has {'.'.join(map(str, capability))}"
        raise UserError(
            f"recipe=nvfp4 needs a GPU of compute capability 8.9 or newer, this machine {here}: quantise on such a "
            f"machine, or take fp8, int8 or int4_awq"
        )


def quantization_config(recipe: str) -> dict[str, Any]:
    """Return what ModelOpt's `quantize` takes for one of RECIPES."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(getattr(mtq, RECIPES[recipe]))
    # Later entries win.
    config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in UNQUANTIZED]
    return config
