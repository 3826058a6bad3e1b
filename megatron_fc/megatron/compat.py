"""Which megatron-core releases the adapter works with."""

import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from megatron_fc.errors import UserError

OLDEST = Version("0.19")
NEWEST_TESTED = Version("0.19.2")


def check_megatron_version() -> None:
    """Refuse a megatron-core that is too old, warn once about one that is newer than what was tested.

    Raises:
        UserError: megatron-core is missing or older than 0.19.
    """
    try:
        installed = Version(version("megatron-core"))
    except PackageNotFoundError:
        raise UserError(f"megatron-core is not installed: pip install 'megatron-core>={OLDEST}'") from None
    if installed < OLDEST:
        raise UserError(f"megatron-core {installed} is too old: pip install 'megatron-core>={OLDEST}'")
    if installed.release[:2] > NEWEST_TESTED.release[:2]:
        warnings.warn(
            f"megatron-core {installed} is newer than {NEWEST_TESTED}, the newest that megatron_fc was tested with",
            stacklevel=2,
        )
