"""The plugin: connections in Megatron's layers, by layer spec.

* `specs`: `connect`, and the names for Megatron's `--spec`
* `slots`: the modules that stand in a layer's norm slot and bias-dropout-add slot
* `flags`: `add_connection_args`, the options of all kinds as Megatron flags
* `refusals`: Megatron options that do not go with connections
* `parameter_order`: `connection_parameters_first`, for half-precision models under the distributed optimizer
* `hybrid`, `input_norm`, `norms`, `parameter_count`, `versions`
"""

from megatron_fc.megatron.versions import check_megatron_version

check_megatron_version()
