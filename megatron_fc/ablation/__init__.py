"""A suite of runs: variants of one config times seeds, and what the variants differ in beyond the noise of seeds.

Doors: `suite.read_suite`, `execute.execute`, `report.write_report`.

* `suite`: the file of a suite, and the runs that it stands for
* `planned`: each run as `megatron-fc train` takes it, and what tells its settings and data from others
* `record`: the small file that is kept of a finished run
* `execute`: starts what is left, so many at a time
* `comparison`: paired differences, their intervals, and the noise that they come from
* `report`: these as JSON, Markdown and PNG
"""
