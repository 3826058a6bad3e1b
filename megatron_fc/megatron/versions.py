"""The megatron-core releases that the plugin works with."""

import runpy
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from packaging.version import InvalidVersion, Version

from megatron_fc.errors import UserError

OLDEST = Version("0.19")
NEWEST_TESTED = Version("0.19.2")  # docs/compatibility.md, written by `make compat`


def check_megatron_version() -> None:
    """Refuse a megatron-core that is too old, warn about one that is newer than what was tested.

    Raises:
        UserError: megatron-core is missing or older than 0.19.
    """
    found = megatron_version()
    if found is None:
        raise UserError(f"megatron-core is not installed: pip install 'megatron-core>={OLDEST}'")
    if found < OLDEST:
        raise UserError(f"megatron-core {found} is too old: pip install 'megatron-core>={OLDEST}'")
    if found > NEWEST_TESTED:
        warnings.warn(
            f"megatron-core {found} is newer than {NEWEST_TESTED}, the newest that megatron_fc was tested with",
            stacklevel=2,
        )


def norms_declare_residual() -> bool:
    """Whether layers ask a norm when they are built if it returns (x, h), as since 0.20; before, they see the tuple."""
    from megatron.core.transformer import torch_norm

    return "returns_residual" in getattr(getattr(torch_norm, "LayerNormInterface", None), "__annotations__", {})


@cache
def check_norm_protocol() -> None:
    """Refuse a megatron-core whose layers may not take (x, h) from a norm slot, when the first one is built.

    Raises:
        UserError: a newer minor version than those tested, in which norms do not declare it.
    """
    found = megatron_version()
    if found is not None and found.release[:2] > NEWEST_TESTED.release[:2] and not norms_declare_residual():
        raise UserError(
            f"megatron-core {found} takes a norm's residual in a way that megatron_fc does not know: use "
            f"megatron-core {OLDEST} to {NEWEST_TESTED}, or a newer one that has the attribute returns_residual"
        )


def megatron_version() -> Version | None:
    """Return the version of the megatron-core that `import megatron.core` takes, None if there is none.

    It is read from the package itself: a checkout of Megatron-LM ahead on PYTHONPATH has no installed metadata, or
    worse, those of the package that it hides. megatron.core is not imported for it, because the CPU lane has to be
    installed before that.
    """
    try:
        spec = find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    facts = runpy.run_path(str(Path(spec.origin).with_name("package_info.py")))
    try:
        return Version("{}.{}.{}{}".format(*facts["VERSION"]))
    except InvalidVersion:  # a pre-release named in a way of its own
        return Version(facts["__shortversion__"])
