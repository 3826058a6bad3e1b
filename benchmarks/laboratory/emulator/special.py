"""Special registers: the numbers of CTAs, threads and lanes, sizes, clocks."""

from typing import Any

import numpy as np

from laboratory.emulator.arith import U32, Array
from laboratory.emulator.grid import LANES
from laboratory.emulator.threads import Threads

SPECIAL = {"ctaid", "clusterid", "tid", "ntid", "nctaid", "nclusterid", "nwarpid", "laneid", "warpid", "smid", "nsmid"}
SPECIAL |= {"cluster_nctaid", "cluster_ctaid", "cluster_ctarank", "cluster_nctarank", "clock", "clock64", "globaltimer"}
SPECIAL |= {"dynamic_smem_size", "total_smem_size"} | {f"lanemask_{c}" for c in ("eq", "lt", "le", "gt", "ge")}


class Special(Threads):
    """Threads that know their place."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._special: dict[str, Array] = {}
        self._time = 0

    def special(self, name: str) -> Array:
        if name not in self._special or name.startswith(("%clock", "%globaltimer")):
            self._special[name] = self._make_special(name)
        return self._special[name]

    def _make_special(self, name: str) -> Array:
        root, _, axis = name[1:].partition(".")
        index = "xyz".find(axis) if axis else 0
        if root in ("ctaid", "clusterid"):
            return np.array([self.grid.cta(int(i))[index] for i in self.batch.ctas], U32)[self.cta]
        if root == "tid":
            return self.thread.astype(U32) if index == 0 else self.k["u32"][0]
        lane = self.lane.astype(U32)
        if root.startswith("lanemask_"):
            bit = U32(1) << lane
            below = bit - U32(1)
            return {"eq": bit, "lt": below, "le": below | bit, "gt": ~(below | bit), "ge": ~below}[root[9:]]
        constants = {"ntid": (self.grid.warps * LANES, 1, 1)[index], "nctaid": self.grid.size[index]}
        constants |= {"nclusterid": self.grid.size[index], "nwarpid": self.grid.warps, "cluster_nctaid": 1}
        constants |= {"cluster_ctaid": 0, "cluster_ctarank": 0, "cluster_nctarank": 1, "smid": 0, "nsmid": 1}
        constants |= {"dynamic_smem_size": self.grid.shared_bytes, "total_smem_size": self.grid.shared_bytes}
        if root in constants:
            return self.k["u32"][constants[root]]
        if root.startswith(("clock", "globaltimer")):
            self._time += 1
            return self.k["u64" if root in ("clock64", "globaltimer") else "u32"][self._time]
        return {"laneid": lane, "warpid": self.warp.astype(U32)}[root]
