"""Megatron on the CPU lane, one rank of it for every file."""

import support.cpu_megatron  # noqa: F401  before anything else imports Megatron
from support.megatron_world import parallel_state as parallel_state
from support.megatron_world import seed as seed
