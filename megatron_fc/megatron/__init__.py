"""The plugin: connections in Megatron's layers, by layer spec.

* `specs`: `connect`, and the names for Megatron's `--spec`
* `slots`: the modules that stand in a layer's norm slot and bias-dropout-add slot
* `stream`, `stack_ends`: a stream that is wider than the model, between pipeline stages and behind the last layer
* `model_config`: what a layer spec alone cannot do, arranged in a model config of Megatron's training loop
* `flags`: `add_connection_args`, the options of all kinds as Megatron flags
* `refusals`: Megatron options that do not go with connections
* `parameter_order`: `connection_parameters_first`, for half-precision models under the distributed optimizer
* `hybrid`, `input_norm`, `norms`, `output_projections`, `own_parameters`, `parameter_count`, `plain_names`,
  `stored_connections`, `versions`
"""

from megatron_fc.megatron.versions import check_megatron_version

check_megatron_version()
