"""Megatron is imported on the CPU lane."""

import support.cpu_megatron  # noqa: F401
