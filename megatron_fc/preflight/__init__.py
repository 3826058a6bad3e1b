"""Before a run: what a config means, what it needs, whether the machines have it.

* `doctor`: what is installed here
* `validation`, `topology`: a config on a number of nodes, checked by Megatron
* `torch_names`: names of torch, on which these two need a second
* `estimate`: the same config as `megatron_fc.planning` sees it
* `requirements`, `nodes`, `rendezvous`, `disk_space`: checked by all ranks at the start of a job
"""
