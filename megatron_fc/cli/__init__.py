"""The commands of `megatron-fc`, a file each: `add` makes its parser, `run` carries it out and returns the exit code.

They import what they need when they run: `runs` and `doctor` answer without torch and Megatron.
"""

from megatron_fc.cli import (
    ablate,
    analyze,
    compare,
    convert,
    data,
    demo,
    distill,
    doctor,
    evaluate,
    evaluate_fetch,
    evaluate_perplexity,
    evaluate_report,
    lm_eval,
    plan,
    preflight,
    prune,
    quantize,
    runs,
    topology,
    traffic,
    train,
    upcycle,
)

# In the order of `megatron-fc --help`.
COMMANDS = (
    train,
    preflight,
    topology,
    plan,
    upcycle,
    convert,
    quantize,
    distill,
    prune,
    evaluate,
    evaluate_fetch,
    evaluate_perplexity,
    evaluate_report,
    lm_eval,
    data,
    demo,
    ablate,
    analyze,
    compare,
    runs,
    traffic,
    doctor,
)
