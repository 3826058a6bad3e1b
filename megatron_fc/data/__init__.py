"""Real text in Megatron's data format, made from what is installed: the door of `megatron-fc data`."""

from megatron_fc.data.demo import DemoData, build_demo_data

__all__ = ["DemoData", "build_demo_data"]
