"""A training run in Megatron's own loop, from a YAML config.

* `config_file`, `megatron_arguments`, `recipe`: the config, checked, as Megatron's command line
* `setup`: Megatron's validated arguments and the model
* `loaded`: the model of a checkpoint
* `counts`, `unused_options`, `rehearsal`, `refusal`: what is refused before the first step
* `loop`: `train`
* `steps`: the bounds of steps, told to callbacks (`megatron_fc.callbacks`)
* `data_files`, `indexed_files`: the files of data, looked at before they are read
* `token_data`, `batches`: data sets, micro-batches, the loss
* `events`: TensorBoard's, on disk after every step
* `precision`, `machine`: what a run asks for and what the machine has
* `cpu_lane`: Megatron without a GPU, over gloo
"""

import megatron_fc.megatron  # noqa: F401  refuses a megatron-core that is missing or too old
