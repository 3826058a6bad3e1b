"""The order of a half-precision model's parameters, on which Megatron's distributed optimizer depends.

Megatron 0.19 lists an optimizer group's fp32 parameters before its half-precision ones, but looks their state up in the
order of the gradient buffers, which is the order in which the dtypes first appear in the model. With the embedding
first the two differ, and writing a checkpoint fails or would take another parameter's state. With a connection's
fp32 parameter first they agree.
"""

from argparse import Namespace
from typing import Any

from torch import nn

from megatron_fc.connections.fp32 import Fp32Parameters
from megatron_fc.errors import UserError


def connection_parameters_first(chunks: list[Any]) -> list[Any]:
    """Let every model chunk list a connection's parameters first: a `pre_wrap_hook` of Megatron's model configs.

    Only the order of registration changes, of no list of layers and in no full-precision model.

    Raises:
        UserError: the first layer of a chunk has no connection to list first.
    """
    for chunk in chunks:
        if (chunk.config.bf16 or chunk.config.fp16) and _sites(chunk):
            _move_first(chunk)
            if not any(next(chunk.parameters()) is p for site in _sites(chunk) for p in site.parameters()):
                raise UserError(
                    "the first layer has no connection, and in half precision Megatron's optimizers cannot write "
                    "fp32 parameters behind others: connect the first layer too, or train with no_save_optim"
                )
    return chunks


def install_order(model_config: Any, args: Namespace | None) -> None:
    """Add the hook to a model config of Megatron, once, and note it in the training arguments."""
    if connection_parameters_first not in model_config.pre_wrap_hooks:
        model_config.pre_wrap_hooks.append(connection_parameters_first)
    if args is not None:
        args.connection_parameters_first = True


def _move_first(module: nn.Module) -> None:
    """Move the child with the first site to the front, and so on inside it."""
    if isinstance(module, Fp32Parameters):
        return
    name = next(name for name, child in module.named_children() if _sites(child))
    # The order of a list of layers is the order in which they run.
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        children = module._modules
        for other in [key for key in children if key != name]:
            children[other] = children.pop(other)
    _move_first(module.get_submodule(name))


def _sites(module: nn.Module) -> list[Fp32Parameters]:
    return [child for child in module.modules() if isinstance(child, Fp32Parameters)]
