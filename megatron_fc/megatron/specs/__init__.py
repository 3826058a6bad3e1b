"""Specs: `connect` for those that you build, and names for Megatron's `--spec megatron_fc.megatron.specs NAME`.

* `dfc_x4`, `sfc_x4`, with any number of fractions, and `from_args` for `--frac-*` flags: in GPT pipelines whose builder
  calls a spec with the model's config, as `pretrain_gpt.py`;
* the same with the prefix `layer_`: in GPT pipelines that take a spec as it is, as `pretrain_vlm.py`;
* the same with the prefix `hybrid_`: in hybrid pipelines.

Names with another number of fractions are made when they are asked for. This is a package because Python's import asks
a package, and no module, for a name that it does not have.
"""

import difflib
import re
from typing import Any

from megatron_fc.errors import UserError
from megatron_fc.megatron.specs.connected import block_spec, connect
from megatron_fc.megatron.specs.named import GPTSpec, UncalledSpec, gpt_spec, named_spec

__all__ = ["block_spec", "connect", "gpt_spec"]

from_args = named_spec("from_args")
dfc_x2 = named_spec("dfc_x2")
dfc_x4 = named_spec("dfc_x4")
dfc_x8 = named_spec("dfc_x8")
sfc_x2 = named_spec("sfc_x2")
sfc_x4 = named_spec("sfc_x4")

layer_from_args = named_spec("layer_from_args")
layer_dfc_x2 = named_spec("layer_dfc_x2")
layer_dfc_x4 = named_spec("layer_dfc_x4")
layer_dfc_x8 = named_spec("layer_dfc_x8")
layer_sfc_x2 = named_spec("layer_sfc_x2")
layer_sfc_x4 = named_spec("layer_sfc_x4")

hybrid_from_args = named_spec("hybrid_from_args")
hybrid_dfc_x2 = named_spec("hybrid_dfc_x2")
hybrid_dfc_x4 = named_spec("hybrid_dfc_x4")
hybrid_dfc_x8 = named_spec("hybrid_dfc_x8")
hybrid_sfc_x2 = named_spec("hybrid_sfc_x2")
hybrid_sfc_x4 = named_spec("hybrid_sfc_x4")

_NAMES = [name for name, value in vars().items() if isinstance(value, (GPTSpec, UncalledSpec))]


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
            f"--spec megatron_fc.megatron.specs {name}: there is no such name; there are dfc_x4, sfc_x4, ..., with the "
            f"number of fractions, and from_args, for hybrid models hybrid_dfc_x4, ..."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
