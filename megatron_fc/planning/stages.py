"""The division of a model's layers among pipeline stages, as Megatron's options say.

Layers are divided evenly, or with the embedding and the loss counted as layers, or with numbers of their own on the
first and last stage, or as a string says (`pipeline_model_parallel_layout`, "Et*3|(tt|)*29,m|L": embedding, layers,
multi-token prediction, loss; stages in the order in which tokens pass them).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

_LETTERS = {"E": "embedding", "t": "layer", "m": "multi-token prediction", "L": "loss"}
_REPEATED = (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))


class Chunk(NamedTuple):
    """What one model chunk of a pipeline rank holds.

    Attributes:
        layers: of the decoder.
        embedding, loss: has the first, the last part of the model.
        prediction: has the layers of multi-token prediction, where the model has any.
    """

    layers: range
    embedding: bool = False
    loss: bool = False
    prediction: bool = False


@dataclass(frozen=True)
class Split:
    """How layers are divided among stages; none of these: evenly.

    Attributes:
        with_embedding, with_loss: these count as a layer of the first, of the last stage.
        first, last: layers of the first and last pipeline rank, None for as many as others have.
        stages: letters of every stage, as `parsed` returns them; replaces all else.
    """

    with_embedding: bool = False
    with_loss: bool = False
    first: int | None = None
    last: int | None = None
    stages: tuple[str, ...] = ()

    def problem(self, layers: int, pipeline: int, virtual: int) -> str | None:
        """The first rule of Megatron's that is broken, as the field, its value and why; None if there is none."""
        return next(self._broken_rules(layers, pipeline, virtual), None)

    def _broken_rules(self, layers: int, pipeline: int, virtual: int) -> Iterator[str]:
        if self.stages:
            yield from self._broken_rules_of_a_string(layers, pipeline)
            return
        counted = layers + self.with_embedding + self.with_loss
        beside = "".join(f" and the {what}" for what, is_counted in self._counted() if is_counted)
        stages = pipeline * virtual
        if self.first is None and self.last is None:
            if counted % stages:
                yield (
                    f"pipeline_model_parallel_size={pipeline} with {virtual} stages per rank does not divide "
                    f"num_layers={layers}{beside}"
                )
            elif counted < stages:
                yield f"num_layers={layers}{beside} is less than {stages} stages"
            return
        given = [size for size in (self.first, self.last) if size is not None]
        named = f"num_layers={layers}"
        if self.with_embedding or self.with_loss:
            also = beside.removeprefix(" and")
            yield f"{named} cannot count{also} as layers beside numbers for the first or last stage"
        left, others = layers - sum(given), pipeline - len(given)
        if left < 0 or (others <= 0 and left) or (others > 0 and left % others):
            yield (
                f"{named} without the {' and '.join(str(size) for size in given)} of "
                f"decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers leaves {left} layers for "
                f"{max(others, 0)} ranks, which is not even"
            )
            return
        for size in (*given, left // others if others > 0 else 0):
            if size % virtual:
                yield f"{size} layers of a pipeline rank do not divide among its {virtual} virtual stages"

    def _counted(self) -> tuple[tuple[str, bool], tuple[str, bool]]:
        return ("embedding", self.with_embedding), ("loss", self.with_loss)

    def _broken_rules_of_a_string(self, layers: int, pipeline: int) -> Iterator[str]:
        name, letters = f"pipeline_model_parallel_layout={'|'.join(self.stages)}", "".join(self.stages)
        if len(self.stages) % pipeline:
            yield (
                f"{name} has {len(self.stages)} stages, no multiple of pipeline_model_parallel_size={pipeline}: write "
                f"as many for every rank; a stage may be empty"
            )
        if not letters.startswith("E") or not letters.endswith("L") or letters.count("E") + letters.count("L") != 2:
            yield f"{name} must begin with its only E and end with its only L"
        if letters.count("t") != layers:
            yield f"{name} has {letters.count('t')} layers, and num_layers={layers}: write a t for each"
        if "t" in letters.partition("m")[2]:
            yield f"{name} has layers behind the multi-token prediction: move m behind the last t"
        if sum("m" in stage for stage in self.stages) > 1:
            yield f"{name} has multi-token prediction in several stages: put all of it into one"
        if any("m" in stage for stage in self.stages[:-pipeline]):
            yield f"{name} has multi-token prediction before the last virtual stage of its rank: move m there"


EVENLY = Split()


def parsed(text: str) -> tuple[str, ...]:
    """Letters of every stage of a `pipeline_model_parallel_layout`.

    Raises:
        ValueError: a letter is not known; says which.
    """
    text = text.replace(",", "").replace(" ", "")
    for pattern in _REPEATED:
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    for letter in text:
        if letter not in _LETTERS and letter != "|":
            known = ", ".join(f"{short} ({long})" for short, long in _LETTERS.items())
            raise ValueError(f"has {letter}, which is none of {known}")
    return tuple(text.split("|"))


@cache
def chunks(layers: int, pipeline: int, virtual: int, split: Split) -> tuple[tuple[Chunk, ...], ...]:
    """What every pipeline rank holds, by its model chunks.

    Megatron deals stages out rank by rank, then chunk by chunk.
    """
    sizes = _sizes(layers, pipeline, virtual, split)
    found: list[list[Chunk]] = [[] for _ in range(pipeline)]
    start, last = 0, len(sizes) - 1
    for stage, size in enumerate(sizes):
        predicts = "m" in split.stages[stage] if "m" in "".join(split.stages) else stage == last
        found[stage % pipeline].append(Chunk(range(start, start + size), stage == 0, stage == last, predicts))
        start += size
    return tuple(tuple(of_rank) for of_rank in found)


def _sizes(layers: int, pipeline: int, virtual: int, split: Split) -> list[int]:
    if split.stages:
        return [stage.count("t") for stage in split.stages]
    if split.first is None and split.last is None:
        stages = pipeline * virtual
        sizes = [(layers + split.with_embedding + split.with_loss) // stages] * stages
        sizes[0] -= split.with_embedding
        sizes[-1] -= split.with_loss
        return sizes
    given = [size for size in (split.first, split.last) if size is not None]
    others = max(pipeline - len(given), 1)
    ranks = [(layers - sum(given)) // others] * pipeline
    if split.first is not None:
        ranks[0] = split.first
    if split.last is not None:
        ranks[-1] = split.last
    return [size // virtual for size in ranks] * virtual
