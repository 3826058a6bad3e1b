"""Observations of sub-layers on validation data, gathered on the first rank from all ranks of any layout.

Ranks keep numbers per token, and never a whole stream: of its inputs a pipeline stage hands on those of its first and
last sub-layer, which border on another stage's.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fc.analysis.source import Source, opened
from megatron_fc.analysis.sub_layers import Streams, SubLayer
from megatron_fc.connections.eager import Coefficients, coefficients

_POSITIONS = 256  # of a sequence, in equal distances, where it is longer


@dataclass
class Part:
    """What one rank has seen; tensors have a row per token, those of its micro-batches one after the other.

    Attributes:
        replica, tensor: its place.
        names: layer and name of its sub-layers, by number.
        coefficients: of its sites, by number.
        starts: the coefficients that its sites had at their initial values, by number.
        cosines: between the inputs of a sub-layer and of the one before, by number.
        borders: inputs of its first and last sub-layer, by number.
        loss: of the data, where the last stage is.
    """

    replica: int
    tensor: int
    names: dict[int, tuple[int, str]] = field(default_factory=dict)
    coefficients: dict[int, list[Coefficients]] = field(default_factory=dict)
    starts: dict[int, Coefficients] = field(default_factory=dict)
    cosines: dict[int, list[Tensor]] = field(default_factory=dict)
    borders: dict[int, list[Tensor]] = field(default_factory=dict)
    loss: float | None = None


@dataclass(frozen=True)
class Observed:
    """What all ranks have seen together.

    Attributes:
        names: layer and name of every sub-layer.
        coefficients: of every site, [T, ...]; empty where residuals are plain.
        starts: what they were at the initial values, [1, ...].
        cosines: [T] between the inputs of each sub-layer from the second on and of the one before.
        tokens: T.
        loss: of the data.
    """

    names: list[tuple[int, str]]
    coefficients: list[Coefficients]
    starts: list[Coefficients]
    cosines: list[Tensor]
    tokens: int
    loss: float


def observe(source: Source) -> Observed | None:
    """Run a checkpoint on validation data; every rank calls it, the first one is given what was seen.

    Raises:
        UserError: the checkpoint is not that of the recipe, or the recipe cannot be run so.
    """
    from megatron.core import parallel_state

    with opened(source) as run:
        part = Part(parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
        collector = _Collector(part, run.args.seq_length)
        with Streams(run.model, collector.see):
            loss = run.validate(0, 1, collector.micro_batch_over)
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            part.loss = loss
        # Without sequence parallelism all tensor-parallel ranks see the same tokens.
        reports = run.args.sequence_parallel or part.tensor == 0
        parts = gathered(part if reports else None)
    return None if parts is None else _together(parts)


def gathered(mine: Any) -> list[Any] | None:
    """What ranks have, without those that have None, on the first rank; None on the others."""
    group = torch.distributed.new_group(backend="gloo")
    is_first = torch.distributed.get_rank() == 0
    found: list[Any] | None = [None] * torch.distributed.get_world_size() if is_first else None
    torch.distributed.gather_object(mine, found, dst=0, group=group)
    return None if found is None else [part for part in found if part is not None]


class _Collector:
    def __init__(self, part: Part, sequence: int) -> None:
        self._part = part
        self._every = max(1, sequence // _POSITIONS)
        self._before: tuple[int, Tensor] | None = None

    def see(self, sub_layer: SubLayer, h: Tensor) -> None:
        number, h = sub_layer.number, h[:: self._every].flatten(0, -2)
        self._part.names[number] = (sub_layer.layer, sub_layer.name)
        x = sub_layer.input(h).float()
        if self._before is None:
            self._part.borders.setdefault(number, []).append(x.cpu())
        else:
            cosine = F.cosine_similarity(x, self._before[1], dim=-1)
            self._part.cosines.setdefault(number, []).append(cosine.cpu())
        self._before = (number, x)
        if sub_layer.site is not None:
            found = coefficients(h, sub_layer.site.operands())
            self._part.coefficients.setdefault(number, []).append(Coefficients(*(table.cpu() for table in found)))
            if number not in self._part.starts:
                self._part.starts[number] = _start(sub_layer.site)

    def micro_batch_over(self) -> None:
        """The stage's last sub-layer has been seen; a stage of one has its border already."""
        if self._before is None:
            return
        number, x = self._before
        if number not in self._part.borders or number in self._part.cosines:
            self._part.borders.setdefault(number, []).append(x.cpu())
        self._before = None


def _start(site: Any) -> Coefficients:
    """The coefficients of a site at its initial values, which do not depend on data."""
    fresh = site.config.build(site.hidden_size, site.sub_layer)
    return coefficients(torch.zeros(1, site.stream_width), fresh.operands())


def _together(parts: Sequence[Part]) -> Observed:
    names = {number: name for part in parts for number, name in part.names.items()}
    numbers = sorted(names)
    places = sorted({(part.replica, part.tensor) for part in parts})
    by_place = {place: [part for part in parts if (part.replica, part.tensor) == place] for place in places}

    def of(number: int, place: tuple[int, int], what: str) -> Any:
        return next((found for part in by_place[place] if (found := getattr(part, what).get(number))), None)

    cosines = []
    for before, number in itertools.pairwise(numbers):
        pieces = []
        for place in places:
            own = of(number, place, "cosines")
            if own is None:  # the first of its stage
                own = [
                    F.cosine_similarity(x, y, dim=-1)
                    for x, y in zip(of(number, place, "borders"), of(before, place, "borders"), strict=True)
                ]
            pieces += own
        cosines.append(torch.cat(pieces))
    sites = []
    for number in numbers:
        pieces = [piece for place in places for piece in of(number, place, "coefficients") or []]
        if pieces:
            sites.append(Coefficients(*(torch.cat(tables) for tables in zip(*pieces, strict=True))))
    by_number = {number: start for part in parts for number, start in part.starts.items()}
    starts = [by_number[number] for number in sorted(by_number)]
    losses = [part.loss for part in parts if part.loss is not None]
    return Observed([names[n] for n in numbers], sites, starts, cosines, _tokens(sites, cosines), losses[0])


def _tokens(sites: Sequence[Coefficients], cosines: Sequence[Tensor]) -> int:
    return len(cosines[0]) if cosines else len(sites[0].beta) if sites else 0
