"""The Megatron adapter, the only place that imports Megatron.

`megatron_fc.megatron.specs.frac_connect` puts Frac-Connections into a layer spec; see its module for the named
specs of Megatron's `--spec`.
"""

from megatron_fc.megatron.compat import check_megatron_version

check_megatron_version()
