"""`megatron-fc distill`: a student learns a teacher's distribution over the next token, in Megatron's own loop.

The teacher is a submodule of the student while it trains (ModelOpt's `kd_loss`): frozen, in none of its checkpoints.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # no Exception, but a BaseException

from megatron_fc.callbacks import Callback, ForwardStep
from megatron_fc.checkpoints.errors import cause_of
from megatron_fc.checkpoints.integrity import refuse_corrupt
from megatron_fc.checkpoints.location import find_checkpoint
from megatron_fc.checkpoints.modelopt_state import refuse_state, require_modelopt
from megatron_fc.checkpoints.structure import refuse_other_connection
from megatron_fc.errors import UserError
from megatron_fc.megatron.parameter_count import ParameterCount
from megatron_fc.megatron.stored_connections import stored_structure
from megatron_fc.training.batches import next_token_loss
from megatron_fc.training.recipe import Recipe, load_recipe
from megatron_fc.training.setup import build, join_world, parse

# Both run on the same ranks and give logits over the same vocabulary.
_SHARED = (
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "seq_length",
    "bf16",
    "fp16",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_size",
    "make_vocab_size_divisible_by",
)
# Two models in one pipeline, a schedule that runs their layers piecemeal, several heads.
_UNSUPPORTED = {
    "pipeline_model_parallel_size": 1,
    "overlap_moe_expert_parallel_comm": False,
    "mtp_num_layers": None,
    "tp_comm_overlap": False,
}


class Distillation(Callback):
    """A teacher for `megatron_fc.training.loop.train`; every rank makes one.

    Args:
        recipe: of the teacher's run.
        checkpoint: the teacher's, a folder of checkpoints or one of them.
        temperature: divides both models' logits.
        lm_loss_weight: of the next-token loss, added to the divergence.

    Raises:
        UserError: ModelOpt is missing, a number makes no sense, or the checkpoint is not that of the recipe.
    """

    def __init__(self, recipe: Recipe, checkpoint: Path, temperature: float = 1.0, lm_loss_weight: float = 0.0) -> None:
        require_modelopt("megatron-fc distill")
        if temperature <= 0:
            raise UserError(f"--temperature {temperature}: it divides the logits and must be positive")
        if lm_loss_weight < 0:
            raise UserError(f"--lm-loss-weight {lm_loss_weight} would reward a loss: give 0 or more")
        self._recipe, self._checkpoint = recipe, find_checkpoint(checkpoint)
        self._temperature, self._lm_loss_weight = temperature, lm_loss_weight
        refuse_state(self._checkpoint, "distil from the checkpoint that it was made of")
        join_world()
        self._args = parse(recipe)
        refuse_other_connection(self._checkpoint, recipe.connection, self._args.hidden_size)

    def arguments_valid(self, args: Namespace) -> None:
        for name, needed in _UNSUPPORTED.items():
            for who, given in (("student", args), ("teacher", self._args)):
                if (value := getattr(given, name, needed)) != needed:
                    raise UserError(f"distillation does not go with {name}={value} of the {who}: set it to {needed}")
        for name in _SHARED:
            values = getattr(args, name, None), getattr(self._args, name, None)
            if values[0] != values[1]:
                raise UserError(f"{name} is {values[1]} for the teacher, {values[0]} for the student: set it alike")

    def model_built(self, args: Namespace, chunks: list[Any], parameters: ParameterCount) -> list[Any]:
        import modelopt.torch.distill as mtd
        import modelopt.torch.opt as mto
        from modelopt.torch.distill.plugins.megatron import (
            DistillationConfig,
            LogitsKLLoss,
            adjust_distillation_model_for_mcore,
        )

        (student,) = chunks
        loss = LogitsKLLoss(student.config, temperature=self._temperature)
        output = "output_layer"
        mode = {"teacher_model": self._load_teacher(), "criterion": {(output, output): loss}, "loss_balancer": None}
        student = mtd.convert(student, mode=[("kd_loss", mode)])
        adjust_distillation_model_for_mcore(student, DistillationConfig(skip_lm_loss=False))
        student.compute_language_model_loss = partial(_on_a_copy, student.compute_language_model_loss)
        # The mode is not restored from checkpoints, which have no teacher.
        mto.ModeloptStateManager(student).state_dict().pop()
        return [student]

    def around_forward_step(self, forward_step: ForwardStep) -> ForwardStep:
        """The same micro-batch, with the divergence from the teacher as loss."""

        @functools.wraps(forward_step)
        def distilled(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
            from megatron.core.utils import unwrap_model

            loss = partial(self._loss, unwrap_model(model))
            return forward_step(data_iterator, model, return_schedule_plan, loss)

        return distilled

    def _loss(self, student: Any, loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        lm_loss, tokens, report = next_token_loss(loss_mask, output)
        (divergence,) = student.compute_kd_loss(
            loss_reduction_fn=partial(_masked_sum, loss_mask), skip_balancer=True
        ).values()
        report["distillation loss"] = torch.cat([divergence.detach().view(1), tokens.view(1)])
        return divergence + self._lm_loss_weight * lm_loss, tokens, report

    def _load_teacher(self) -> Any:
        """The teacher with its weights, on this rank, not wrapped."""
        from megatron.core import dist_checkpointing, mpu
        from megatron.training import get_args

        refuse_corrupt(self._checkpoint)
        self._args.padded_vocab_size = get_args().padded_vocab_size
        (teacher,) = build(self._args, self._recipe, in_wrapper=False)
        folder = str(self._checkpoint)
        metadata = {
            **(dist_checkpointing.load_content_metadata(folder) or {}),
            "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        }
        try:
            loaded = dist_checkpointing.load({"model": teacher.sharded_state_dict(metadata=metadata)}, folder)
            teacher.load_state_dict(loaded["model"])
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"the teacher's checkpoint {folder} does not fit its config, {cause_of(error)}: give --teacher-config, "
                f"the config of the run that wrote it"
            ) from error
        return teacher


def teacher_recipe(config: Path, overrides: Sequence[str], teacher_config: Path | None, checkpoint: Path) -> Recipe:
    """Return the recipe of the teacher: its own file, or the student's with the connections of the checkpoint.

    Args:
        config: the student's file.
        overrides: of the student; to a file of the teacher's own apply those of what both models have alike.
        teacher_config: the teacher's file, None if it differs in nothing or in having plain residuals.
        checkpoint: the teacher's.

    Raises:
        UserError: as `load_recipe` and `find_checkpoint`.
    """
    if teacher_config is not None:
        # Without their sections: the teacher's file may have them in others.
        named = {name.rpartition(".")[2]: value for name, _, value in (word.partition("=") for word in overrides)}
        alike = [f"{name}={value}" for name, value in named.items() if name in (*_SHARED, "precision")]
        return load_recipe(teacher_config, alike)
    plain = not stored_structure(find_checkpoint(checkpoint))
    return load_recipe(config, [*overrides, *(["connection=residual"] if plain else [])])


def _on_a_copy(lm_loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor, logits: Tensor) -> Tensor:
    """Megatron's cross-entropy overwrites its logits, from which the divergence is still to be computed."""
    return lm_loss(labels, logits.clone())


def _masked_sum(loss_mask: Tensor, loss: tuple[Tensor, bool, bool]) -> Tensor:
    """Sum a loss over the tokens that count, and over the vocabulary's shards.

    Args:
        loss_mask: [b, s].
        loss: what `LogitsKLLoss` returns: [b, s], whether it is a part of the vocabulary's sum, and a flag of others.
    """
    from megatron.core import mpu

    total = (loss[0].float() * loss_mask).sum()
    if not loss[1]:
        return total
    whole = total.detach().clone()
    torch.distributed.all_reduce(whole, group=mpu.get_tensor_model_parallel_group())
    return total + (whole - total.detach())  # every rank's gradient is that of its own part
