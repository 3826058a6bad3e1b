import support.cpu_megatron  # noqa: F401
