"""ModelOpt's record of what it did to a model, `modelopt_state/` in Megatron's checkpoints.

Megatron's own code writes it, but the wheel of megatron-core lacks `megatron.post_training`, whose absence turns that
code off: without the record a quantised checkpoint could not be loaded again.
"""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from megatron_fc.callbacks import Callback
from megatron_fc.connections.ends import LearnedLeave
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount
from megatron_fc.megatron.slots import NormSlot

# The connections' parameters belong to no linear layer, so nothing would quantise them; the pattern keeps it so.
# ModelOpt would quantise the input of torch's LayerNorm, and lose its scale when the checkpoint is loaded again.
UNQUANTIZED = ("*.connection.*", "*norm*")
_STATE = "modelopt_state"


def require_modelopt(purpose: str) -> None:
    """Check that ModelOpt is installed.

    Args:
        purpose: what needs it, the subject of the sentence.

    Raises:
        UserError: it is not.
    """
    if find_spec("modelopt") is None:
        raise UserError(f"{purpose} needs NVIDIA ModelOpt, which is not installed: pip install 'megatron_fc[modelopt]'")


def has_state(checkpoint: Path) -> bool:
    """Whether ModelOpt has changed the model of this checkpoint, by quantisation say."""
    return (checkpoint / _STATE).is_dir()


def refuse_state(checkpoint: Path, remedy: str) -> None:
    """Check that a checkpoint is that of a model as Megatron builds it.

    Raises:
        UserError: ModelOpt has changed it.
    """
    if has_state(checkpoint):
        raise UserError(f"the checkpoint {checkpoint} is quantised: {remedy}")


def restore_state(chunks: list[Any], checkpoint: Path) -> list[Any]:
    """Change a model as the checkpoint's model was changed, before its weights are loaded; every rank calls it.

    Raises:
        UserError: the run has virtual pipeline stages.
    """
    from modelopt.torch.opt.plugins import restore_sharded_modelopt_state

    refuse_virtual_stages(chunks)
    restore_sharded_modelopt_state(chunks, str(checkpoint))
    refuse_quantized_connections(chunks[0])
    return chunks


def refuse_quantized_connections(model: nn.Module) -> None:
    """Check that no quantizer is at work in the slots of the connections, norms included, or where a stream is left.

    Raises:
        UserError: one is.
    """
    for slot, module in model.named_modules():
        if isinstance(module, (NormSlot, LearnedLeave)) and (enabled := enabled_quantizers(module)):
            raise UserError(
                f"{slot}.{enabled[0]} quantises a connection, whose coefficients scale the whole residual "
                f"stream: quantise with megatron-fc quantize, or disable {', '.join(UNQUANTIZED)}"
            )


def enabled_quantizers(model: nn.Module) -> list[str]:
    """Return the names of the quantizers that are at work in a model."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return [name for name, module in model.named_modules() if isinstance(module, TensorQuantizer) and module.is_enabled]


def refuse_virtual_stages(chunks: list[Any]) -> None:
    """Check that this rank has one model chunk, all that ModelOpt can record.

    Raises:
        UserError: it has more.
    """
    if len(chunks) > 1:
        raise UserError(
            "ModelOpt does not know virtual pipeline stages: leave num_layers_per_virtual_pipeline_stage, "
            "num_virtual_stages_per_pipeline_rank and pipeline_model_parallel_layout unset"
        )


class ModelOptState(Callback):
    """Lets a run go on from a checkpoint whose model ModelOpt has changed, and write such checkpoints.

    Args:
        checkpoint: returns the one that the run starts from, once the ranks are joined.
    """

    def __init__(self, checkpoint: Callable[[], Path | None]) -> None:
        self._checkpoint = checkpoint
        self._patches = contextlib.ExitStack()

    def arguments_valid(self, args: Namespace) -> None:
        require_modelopt(f"the checkpoint {self._checkpoint()}, which is quantised,")

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        checkpoint = self._checkpoint()
        assert checkpoint is not None
        restore_state(chunks, checkpoint)
        self._patches.enter_context(state_in_checkpoints())
        return chunks

    def end(self) -> None:
        self._patches.close()

    def failed(self, error: BaseException) -> BaseException:
        self._patches.close()
        return error


@contextlib.contextmanager
def state_in_checkpoints() -> Iterator[None]:
    """Let Megatron write the record with every checkpoint of a changed model, as it does from a source checkout."""
    from megatron.training import checkpointing
    from modelopt.torch.opt.plugins import save_sharded_modelopt_state

    if checkpointing.has_nvidia_modelopt:
        yield
        return
    checkpointing.save_sharded_modelopt_state = save_sharded_modelopt_state
    checkpointing.print_distributed_quant_summary = lambda *_, **__: None  # of the missing package
    checkpointing.has_nvidia_modelopt = True
    try:
        yield
    finally:
        checkpointing.has_nvidia_modelopt = False
