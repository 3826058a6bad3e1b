#!/usr/bin/env bash
# A checkpoint in the lm-evaluation-harness's own command line, on a task of your own that needs no internet.
#
#   make demo                                       # makes the checkpoint and the tokenizer
#   examples/evaluate.sh [CHECKPOINTS [CONFIG]]     # by default those of the demo, from the repository's folder
#
# All options are the harness's; tasks of the harness go in place of --include_path and --tasks, e.g. --tasks arc_easy,
# whose data the harness fetches. Needs pip install 'THIS_CHECKOUT[train,eval]'.
#
# You should see the harness's table, with an accuracy for the twelve questions of examples/tasks/python_words.jsonl:
#
#   |   Tasks    |Version|Filter|n-shot|Metric|   |Value |   |Stderr|
#   |python_words|Yaml   |none  |     0|acc   |↑  |...|±  |...|
set -euo pipefail
checkpoints=${1:-runs/demo/dfc_x4/checkpoints}
config=${2:-configs/demo.yaml}

megatron-fc lm-eval run --model megatron_fc --model_args "checkpoint=$checkpoints" "config=$config" \
    --include_path examples/tasks --tasks python_words --batch_size 8
