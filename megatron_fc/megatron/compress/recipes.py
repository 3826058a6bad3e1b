"""The quantisation recipes: ModelOpt's own, with Frac-Connections and norms left out."""

import copy
from typing import Any

import torch
from torch import nn

from megatron_fc.errors import UserError
from megatron_fc.megatron import cpu
from megatron_fc.megatron.slots import FracNorm

RECIPES = {
    "fp8": "FP8_DEFAULT_CFG",
    "int8": "INT8_DEFAULT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
# FC's parameters belong to no linear layer, so nothing would quantise them; the pattern keeps it so. ModelOpt would
# quantise the input of torch's LayerNorm, and lose its scale when the checkpoint is loaded again.
UNQUANTIZED = ("*.connection.*", "*norm*")
_NVFP4_CAPABILITY = (8, 9)


def refuse_unavailable(recipe: str) -> None:
    """Check that this machine can compute a recipe.

    Raises:
        UserError: it cannot.
    """
    if recipe != "nvfp4":
        return
    capability = (0, 0) if cpu.needed() else torch.cuda.get_device_capability()
    if capability < _NVFP4_CAPABILITY:
        here = "has no CUDA device" if cpu.needed() else f"has {'.'.join(map(str, capability))}"
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


def refuse_quantized_connections(model: nn.Module) -> None:
    """Check that no quantizer is at work in the slots of the Frac-Connections, norms included.

    Raises:
        UserError: one is.
    """
    for slot, module in model.named_modules():
        if isinstance(module, FracNorm) and (enabled := enabled_quantizers(module)):
            raise UserError(
                f"{slot}.{enabled[0]} quantises a Frac-Connection, whose coefficients scale the whole residual "
                f"stream: quantise with megatron-fc quantize, or disable {', '.join(UNQUANTIZED)}"
            )


def enabled_quantizers(model: nn.Module) -> list[str]:
    """Return the names of the quantizers that are at work in a model."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return [name for name, module in model.named_modules() if isinstance(module, TensorQuantizer) and module.is_enabled]
