"""Importing this lets Megatron be imported on the CPU lane, as a folder's conftest does before its tests are read."""

import warnings

from megatron_fc.training import cpu_lane

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    cpu_lane.install()
    import megatron.core  # noqa: F401

    import support.megatron_parser  # noqa: F401
