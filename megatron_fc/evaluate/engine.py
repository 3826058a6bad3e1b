"""A checkpoint's model on all ranks of any layout: the first rank leads and hands work to all, the others follow it.

So everything but the model, the harness, data and files, is the first rank's alone.
"""

import contextlib
import datetime
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_fc.checkpoints.changes import refuse_other_vocabulary, stored_args
from megatron_fc.errors import UserError
from megatron_fc.evaluate.batching import rounds
from megatron_fc.evaluate.generation import Sampling, generate_batch
from megatron_fc.evaluate.scoring import Row, Score, score_batches
from megatron_fc.training.loaded import load_model, load_weights
from megatron_fc.training.recipe import Recipe
from megatron_fc.training.setup import ended_world, quiet
from megatron_fc.training.tokenizer_digest import tokenizer_digest

# The leader may read data for as long, the others wait.
_PATIENCE = datetime.timedelta(days=7)


class Engine:
    """A loaded model; `open_engine` makes one.

    Args:
        args: Megatron's.
        chunks: this rank's model.
        control: a group of all ranks on the CPU.
        batch_size: how many sequences of full length a replica runs at once, None for the run's micro-batch.

    Attributes:
        args: Megatron's; `iteration` and `consumed_train_samples` are those of the checkpoint.
        tokenizer: Megatron's.
        max_length: tokens that the model reads.
        leads: this is the rank that hands out work; on others only `follow` is called.
    """

    def __init__(self, args: Namespace, chunks: list[Any], control: Any, batch_size: int | None) -> None:
        from megatron.core import parallel_state
        from megatron.training.global_vars import get_tokenizer

        self.args, self.tokenizer = args, get_tokenizer()
        self.max_length: int = args.seq_length
        self.leads = torch.distributed.get_rank() == 0
        self._chunks, self._control = chunks, control
        self._batch_tokens = (batch_size or args.micro_batch_size) * args.seq_length
        self._replica, self._replicas = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        self._stages = args.pipeline_model_parallel_size
        self._has_failed = False
        self._reports = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )

    @property
    def first_token(self) -> int:
        """What a text begins behind: the token that begins documents, else the one that ends them."""
        beginning = self.tokenizer.bos
        return int(self.tokenizer.eod if beginning is None else beginning)

    def score(self, rows: Sequence[Row]) -> Iterator[list[tuple[int, Score]]]:
        """Score rows; yields, for each round of batches, the numbers of the rows in it and their scores."""
        lengths = [len(row.tokens) - 1 for row in rows]
        for found in rounds(lengths, self._batch_tokens, self._replicas * self._stages):
            # Sequence parallelism splits a row evenly.
            tensor = self.args.tensor_model_parallel_size
            length = -(-max(1, lengths[found.numbers[0]]) // tensor) * tensor
            work = [rows[number] for number in found.numbers]
            yield list(zip(found.numbers, self._together("_score", work, found.size, length), strict=True))

    def generate(
        self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], sampling: Sampling
    ) -> Iterator[list[tuple[int, str]]]:
        """Generate text behind prompts, which leave room for it; yields as `score` does.

        Args:
            prompts: tokens of each.
            seeds: of what is drawn, one per prompt; a replica draws its batch by the first one's.
            sampling: of all.
        """
        for found in rounds([len(prompt) + sampling.tokens for prompt in prompts], self._batch_tokens, self._writers):
            work = [prompts[number] for number in found.numbers]
            drawn = [seeds[number] for number in found.numbers]
            texts = self._together("_generate", work, drawn, found.size, sampling)
            yield list(zip(found.numbers, texts, strict=True))

    def load(self, checkpoint: Path) -> None:
        """Put the weights of another checkpoint of the run into the model."""
        self._together("_load", checkpoint)

    def follow(self) -> None:
        """Do what the leader hands out, until it ends."""
        while (order := self._heard(None)) is not None:
            self._do(*order)

    def end(self) -> None:
        """Let the others end. Where a work has failed they do not listen: it failed there, too, or they hang in it."""
        if not self._has_failed:
            self._heard(None)

    @property
    def _writers(self) -> int:
        """Replicas that generate different texts. Ranks that share experts step together, so they write the same."""
        return 1 if self.args.expert_model_parallel_size > 1 else self._replicas

    def _together(self, name: str, *given: Any) -> Any:
        return self._do(*self._heard((name, given)))

    def _heard(self, order: Any) -> Any:
        heard = [order]
        torch.distributed.broadcast_object_list(heard, src=0, group=self._control)
        return heard[0]

    def _do(self, name: str, given: tuple[Any, ...]) -> Any:
        self._has_failed = True
        with quiet():
            done = getattr(self, name)(*given)
        self._has_failed = False
        return done

    def _load(self, checkpoint: Path) -> None:
        load_weights(self.args, self._chunks, checkpoint, _without)

    def _score(self, rows: list[Row], size: int, length: int) -> list[Score]:
        first = self._replica * self._stages
        batches = [rows[(first + stage) * size :][:size] for stage in range(self._stages)]
        return self._gathered(score_batches(self.args, self._chunks, batches, size, length))

    def _generate(self, prompts: list[tuple[int, ...]], seeds: list[int], size: int, sampling: Sampling) -> list[str]:
        writer = self._replica % self._writers
        first = writer * size
        own = prompts[first:][:size]
        texts = generate_batch(self.args, self._chunks[0], self.tokenizer, own, sampling, seeds[first]) if own else []
        return self._gathered(texts if self._replica == writer else [])

    def _gathered(self, own: list[Any]) -> list[Any]:
        """What the replicas have found, in their order, on the leader; nothing on others."""
        found: list[Any] | None = [None] * torch.distributed.get_world_size() if self.leads else None
        mine = (self._replica, own) if self._reports else None
        torch.distributed.gather_object(mine, found, dst=0, group=self._control)
        by_replica = sorted((part for part in found or [] if part is not None), key=lambda part: part[0])
        return [answer for _, answers in by_replica for answer in answers]


class NothingToDo(Exception):
    """The leader has found that everything is there already."""


@contextlib.contextmanager
def open_engine(
    recipe: Recipe,
    checkpoint: Path,
    batch_size: int | None = None,
    prepare: Callable[[Namespace], Path | None] | None = None,
) -> Iterator[Engine]:
    """Build a recipe's model, load a checkpoint into it, and end Megatron's world afterwards; every rank calls it.

    Args:
        recipe: of the run that wrote the checkpoint; the layout is free.
        checkpoint: one of its folders.
        batch_size: how many sequences of full length a replica runs at once, None for the run's micro-batch.
        prepare: what the leader does before anything is built, given Megatron's arguments; returns the checkpoint to
            load, None if there is nothing to do.

    Raises:
        UserError: the recipe cannot be evaluated, what the leader found, or the checkpoint is not that of the recipe.
        NothingToDo: says the leader.
    """
    control: list[Any] = []

    def ready(args: Namespace) -> Path:
        control.append(torch.distributed.new_group(backend="gloo", timeout=_PATIENCE))
        if args.virtual_pipeline_model_parallel_size is not None:
            raise UserError(
                "evaluation knows no virtual pipeline stages: set num_layers_per_virtual_pipeline_stage, "
                "num_virtual_stages_per_pipeline_rank and pipeline_model_parallel_layout to null, whatever the "
                "checkpoint has"
            )
        _refuse_other_tokens(checkpoint, args)
        chosen = _told(control[0], partial(prepare, args) if prepare else lambda: checkpoint)
        if chosen is None:
            raise NothingToDo
        return chosen

    with ended_world():
        with quiet():
            args, chunks, _ = load_model(recipe, checkpoint, partial(_settle, checkpoint), ready, _without)
        engine = Engine(args, chunks, control[0], batch_size)
        try:
            yield engine
        finally:
            if engine.leads:
                engine.end()


def _without(checkpoint: Path) -> str:
    return (
        f"put a copy in its place; or move {checkpoint} out of its folder and evaluate the others, with --every or by "
        f"their iter_ folders"
    )


def _settle(checkpoint: Path, args: Namespace) -> None:
    if args.context_parallel_size > 1:
        raise UserError(
            f"context_parallel_size={args.context_parallel_size}: evaluation keeps sequences whole, set it to 1"
        )
    _refuse_other_ranks(args)
    if args.moe_expert_capacity_factor is not None:
        raise UserError(
            f"moe_expert_capacity_factor={args.moe_expert_capacity_factor} drops tokens, and what is dropped depends "
            f"on the other requests of a batch: set moe_expert_capacity_factor=null"
        )
    if args.moe_router_force_load_balancing or args.moe_router_force_biased is not None:
        raise UserError(
            "moe_router_force_load_balancing and moe_router_force_biased route at random, in evaluation too: drop them"
        )
    if args.moe_input_jitter_eps is not None:
        raise UserError(
            f"moe_input_jitter_eps={args.moe_input_jitter_eps} multiplies inputs by noise, in evaluation too: set "
            f"moe_input_jitter_eps=null"
        )
    # A batch is none of the training's.
    args.global_batch_size = args.rampup_batch_size = args.step_batch_size_schedule = None
    args.finetune = False
    keep_vocabulary(checkpoint, args)


def _refuse_other_ranks(args: Namespace) -> None:
    """Check that the layout divides the ranks that were started; a run's config has the layout of its training."""
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    of_experts = (args.expert_tensor_parallel_size or tensor) * args.expert_model_parallel_size
    needed = math.lcm(tensor, of_experts) * stages
    if args.world_size % needed:
        raise UserError(
            f"tensor_model_parallel_size={tensor}, pipeline_model_parallel_size={stages} and expert_model_parallel_size"
            f"={args.expert_model_parallel_size} take {needed} ranks or a multiple, not {args.world_size}: start them, "
            f"torchrun --nproc-per-node={needed} -m megatron_fc ..., or set other sizes, which are free"
        )


def keep_vocabulary(checkpoint: Path, args: Namespace) -> None:
    """Keep a checkpoint's vocabulary, its padding too: Megatron pads by the layout, every entry counts in a softmax.

    Raises:
        UserError: a setting asks for another one, or the layout does not divide it.
    """
    stored = getattr(stored_args(checkpoint), "padded_vocab_size", None)
    if stored is None:  # another program wrote it
        return
    if args.padded_vocab_size not in (None, stored):
        raise UserError(f"padded_vocab_size={args.padded_vocab_size}, but {checkpoint} has {stored}: drop the setting")
    if stored % args.tensor_model_parallel_size:
        raise UserError(
            f"tensor_model_parallel_size={args.tensor_model_parallel_size} does not divide the vocabulary of "
            f"{checkpoint}, {stored} entries with its padding: give one that does"
        )
    args.padded_vocab_size = stored


def _refuse_other_tokens(checkpoint: Path, args: Namespace) -> None:
    from megatron.training.global_vars import get_tokenizer

    tokenizer = get_tokenizer()
    if args.padded_vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"tokenizer_model={args.tokenizer_model} has {tokenizer.vocab_size} tokens, and the model's vocabulary "
            f"{args.padded_vocab_size}: give the tokenizer that the model was trained with"
        )
    args.tokenizer_digest = tokenizer_digest(args, tokenizer)
    refuse_other_vocabulary(checkpoint, args)


def _told(control: Any, prepare: Callable[[], Path | None]) -> Path | None:
    """What the leader's `prepare` returns, on every rank, or the refusal that it raises."""
    told: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            told = [prepare()]
        except UserError as error:
            told = [error]
    torch.distributed.broadcast_object_list(told, src=0, group=control)
    if isinstance(told[0], UserError):
        raise UserError(str(told[0]))
    return told[0]
