"""What goes along with a training run, on every rank, and what it may change."""

from argparse import Namespace
from typing import Any

from megatron_fc.megatron.parameter_count import ParameterCount


class Companion:
    """Goes along with `pretrain.train`. This one does nothing; others override what they need."""

    def arguments_are_valid(self, args: Namespace) -> None:
        """Called when Megatron has validated the arguments, before anything is written.

        Raises:
            UserError: the run cannot be accompanied.
        """

    def model_is_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        """Called when Megatron has joined the ranks and built this rank's chunks; returns those to train."""
        return chunks

    def forward_step(self, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
        """Run one micro-batch, as `batches.forward_step` does."""
        from megatron_fc.training.batches import forward_step

        return forward_step(data_iterator, model, return_schedule_plan)

    def after_training(self) -> None:
        """Called when Megatron's loop has ended, before the ranks part."""

    def after_a_loss(self) -> str | None:
        """Called when another rank was lost, before this one ends; returns what to do, None for what is usual."""
        return None
