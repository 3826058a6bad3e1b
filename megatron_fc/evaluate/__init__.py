"""Evaluation of checkpoints in any layout, with EleutherAI's lm-evaluation-harness (extra `eval`).

Doors: `evaluate.evaluate`, `perplexity.perplexity`, `tasks.fetch`, `report.write_report`, and
`command_line.run_command_line` for the harness's own command line.

* `engine`: the model on all ranks, led by the first
* `scoring`, `generation`, `batching`: what ranks compute, in batches of like length
* `questions`, `answers`: requests, and what is known already, on disk
* `harness`: the harness's view of it; `command_line` registers it there
* `task_list`, `tasks`: which tasks, and their data
* `windows`, `texts`: long texts and validation sets as rows to score
* `chosen`, `recipes`: checkpoints of a run, and its recipe without training data
* `results`, `report`: files of results, and the table and the curves that are made of them
"""

import megatron_fc.megatron  # noqa: F401  refuses a megatron-core that is missing or too old
