"""What tests share.

* `training_runs`: `megatron-fc train` as a user runs it, on a tiny config with data of its own
* `tiny`: small Megatron models; `megatron_world`: Megatron's state of one rank; `fake_world`: of any rank of many
* `harness`, `ranks`, `layouts`: functions on several ranks over gloo
* `cluster`, `site_files`: a real SLURM in a folder
* `oracle`, `kernel_reference`: float64 references
* `damage`, `disk`, `patience`: broken files, slow disks, waiting for events
"""
