"""Specs: `connect` and `place_norms` for yours, and names for Megatron's `--spec megatron_fc.megatron.specs NAME`.

* the labels of connections, `dfc_x4`, `dhc_x4`, `mhc_x4` ..., and `from_args` for flags: in GPT pipelines whose builder
  calls a spec with the model's config, as `pretrain_gpt.py`;
* the same with the prefix `layer_`: in GPT pipelines that take a spec as it is, as `pretrain_vlm.py`;
* the same with the prefix `hybrid_`: in hybrid pipelines.

A name is made when it is asked for. This is a package because Python's import asks a package, and no module,
for a name that it does not have.
"""

import difflib
import re
from typing import Any

from megatron_fc.connections.kinds import MEMBERS
from megatron_fc.errors import UserError
from megatron_fc.megatron.specs.connected import block_spec, connect
from megatron_fc.megatron.specs.named import gpt_spec, named_spec
from megatron_fc.megatron.specs.norms import place_norms

__all__ = ["block_spec", "connect", "gpt_spec", "place_norms"]

_NAMES = [
    f"{prefix}{name}"
    for prefix in ("", "layer_", "hybrid_")
    for name in ("from_args", *(f"{member}_x{rate}" for member in MEMBERS for rate in (2, 4, 8)))
]


def __getattr__(name: str) -> Any:
    """Make the spec of a name, once.

    Raises:
        UserError: the name looks like that of a spec and is none.
        AttributeError: any other name.
    """
    spec = named_spec(name)
    if spec is not None:
        globals()[name] = spec
        return spec
    # Megatron looks into the namespace next and would fail with the bare name; hasattr is answered as by any module.
    if re.search(r"\d$", name) or difflib.get_close_matches(name, _NAMES):
        raise UserError(
            f"--spec megatron_fc.megatron.specs {name}: there is no such name; there are "
            f"{', '.join(f'{member}_x4' for member in MEMBERS)}, with any number of slots, dhc_x4_m2 of two fractions, "
            f"and from_args; docs/plug-in.md says which scripts take them with layer_ or hybrid_ in front"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
