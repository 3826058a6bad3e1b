"""Placement of parallel groups: their ranks and nodes, in Megatron's order tp-cp-ep-dp-pp."""

from math import prod

from megatron_fc.planning.layout import Layout


class Placement:
    """A rank's place in its groups.

    Args:
        layout: the parallel sizes; ranks fill one node after the other.
        rank: in the world.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        # From the kind whose ranks are neighbours to the one whose ranks are farthest apart.
        dense = {"tp": layout.tensor, "cp": layout.context, "dp": layout.data, "pp": layout.pipeline}
        experts = {
            "etp": layout.expert_tensor,
            "ep": layout.expert,
            "expert_dp": layout.expert_data,
            "pp": layout.pipeline,
        }
        self._places: dict[str, tuple[int, int]] = {}  # size and stride by kind
        for sizes in (dense, experts):
            kinds = list(sizes)
            for number, kind in enumerate(kinds):
                self._places[kind] = sizes[kind], prod(sizes[before] for before in kinds[:number])

    @property
    def stage(self) -> int:
        """Rank in the pipeline."""
        return self.coordinate("pp")

    def coordinate(self, kind: str) -> int:
        """Rank within the group of one kind of parallelism."""
        size, stride = self._places[kind]
        return self.rank // stride % size

    def size(self, kinds: str) -> int:
        """Ranks of a group that spans kinds of parallelism, say `dp-cp`."""
        return prod(self._places[kind][0] for kind in kinds.split("-"))

    def name(self, kinds: str) -> str:
        """A group's name: the kinds that have more than one rank."""
        return "-".join(kind for kind in kinds.split("-") if self._places[kind][0] > 1)

    def following(self, kinds: str) -> int:
        """The next rank in the ring of a group, whose ranks are in ascending order."""
        to = self.rank
        for kind in sorted(kinds.split("-"), key=lambda kind: self._places[kind][1]):
            size, stride = self._places[kind]
            if self.coordinate(kind) + 1 < size:
                return to + stride
            to -= (size - 1) * stride
        return to

    def peer(self, kind: str, coordinate: int) -> int:
        """The rank that differs from this one in one kind alone; coordinates count from the end if negative."""
        size, stride = self._places[kind]
        return self.rank + (coordinate % size - self.coordinate(kind)) * stride

    def is_on_this_node(self, rank: int) -> bool:
        return rank // self.layout.gpus_per_node == self.rank // self.layout.gpus_per_node
