import support.cpu_megatron  # noqa: F401

# The fixture that makes a tiny config and its data; pytest finds it by its name here.
from support.training_runs import config as config
