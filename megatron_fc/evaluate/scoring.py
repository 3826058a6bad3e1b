"""Log-likelihoods of tokens: batches through Megatron's pipeline schedule, on every rank.

The softmax is over Megatron's whole vocabulary, its padding included, as in the training loss.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

_ROWS = 2048  # of logits over a whole vocabulary, in fp32 at once


@dataclass(frozen=True)
class Row:
    """A sequence whose last tokens are scored.

    Attributes:
        tokens: one more than the model reads.
        scored: how many of the last ones.
    """

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Score:
    """What the model says of a row's scored tokens.

    Attributes:
        logprob: natural logarithm of their joint probability, given the tokens before.
        is_greedy: each of them is the likeliest in its place.
    """

    logprob: float
    is_greedy: bool


def score_batches(
    args: Namespace, chunks: list[Any], batches: Sequence[Sequence[Row]], size: int, length: int
) -> list[Score]:
    """Score the rows of this rank's replica.

    All ranks call it with as many batches of one shape: ranks that share experts or a pipeline wait for each other.

    Args:
        args: Megatron's.
        chunks: this rank's model.
        batches: micro-batches; those with fewer rows than `size` are filled up.
        size: rows of a batch.
        length: tokens of a row that the model reads.

    Returns:
        A score per row, in order; none on a rank before the last pipeline stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, args),
            data_iterator=iter([_inputs(batch, size, length) for batch in batches]),
            model=chunks,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return [score for batch, scores in zip(batches, found, strict=False) for score in scores[: len(batch)]]


def _inputs(batch: Sequence[Row], size: int, length: int) -> dict[str, Tensor]:
    """Tokens [b, s], labels [b, s] and what of them is scored [b, s]; the rest is zero."""
    tokens, labels = torch.zeros(2, size, length, dtype=torch.long)
    scored = torch.zeros(size, length, dtype=torch.bool)
    for number, row in enumerate(batch):
        read = len(row.tokens) - 1
        assert 0 <= row.scored <= read, f"{row.scored} tokens to score behind {len(row.tokens) - row.scored}"
        tokens[number, :read] = torch.tensor(row.tokens[:-1])
        labels[number, :read] = torch.tensor(row.tokens[1:])
        scored[number, read - row.scored : read] = True
    return {name: value.cuda() for name, value in (("tokens", tokens), ("labels", labels), ("scored", scored))}


def _forward_step(args: Namespace, batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Any, Any]:
    batch = next(batches)
    size, length = batch["tokens"].shape
    positions = torch.arange(length, device=batch["tokens"].device).expand(size, -1)
    mask = None
    if args.create_attention_mask_in_dataloader:  # otherwise the attention makes its own
        mask = torch.ones(length, length, dtype=torch.bool, device=positions.device).triu(1)[None, None]
    return model(batch["tokens"], positions, mask), partial(_scores, batch["labels"], batch["scored"])


def _scores(labels: Tensor, scored: Tensor, logits: Tensor, non_loss_data: bool) -> list[Score]:
    """Scores of all rows, of this rank's share of the logits [b, s, v/t]."""
    where = scored.flatten().nonzero().squeeze(-1)
    wanted = labels.flatten()[where]
    pieces = [
        token_scores(logits.flatten(0, 1)[places].float(), tokens)
        for places, tokens in zip(where.split(_ROWS), wanted.split(_ROWS), strict=True)
    ]
    logprobs, greedy = (torch.cat(column) for column in zip(*pieces, strict=True)) if pieces else (where, where)
    counts = scored.sum(1).tolist()
    by_row = zip(logprobs.double().cpu().split(counts), greedy.bool().cpu().split(counts), strict=True)
    return [Score(float(of_row.sum()), bool(is_greedy.all())) for of_row, is_greedy in by_row]


def token_scores(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each token [n], and whether it is the likeliest [n].

    Args:
        logits: [n, v/t] in fp32, this tensor rank's share of the vocabulary.
        tokens: [n], of the whole vocabulary.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    first = group.rank() * logits.shape[1]

    def over_ranks(values: Tensor, how: Any) -> Tensor:
        torch.distributed.all_reduce(values, how, group=group)
        return values

    own_largest, place = logits.max(1)
    largest = over_ranks(own_largest.clone(), torch.distributed.ReduceOp.MAX)
    total = over_ranks((logits - largest[:, None]).exp().sum(1), torch.distributed.ReduceOp.SUM)
    # The first of several likeliest tokens counts.
    place = torch.where(own_largest == largest, place + first, torch.iinfo(torch.long).max)
    likeliest = over_ranks(place, torch.distributed.ReduceOp.MIN)
    is_here = (tokens >= first) & (tokens < first + logits.shape[1])
    here = logits.gather(1, torch.where(is_here, tokens - first, 0)[:, None]).squeeze(1)
    wanted = over_ranks(torch.where(is_here, here, 0.0), torch.distributed.ReduceOp.SUM)
    return wanted - largest - total.log(), tokens == likeliest
