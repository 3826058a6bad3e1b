"""Counters of a training step: bytes of device memory, bytes on the network, kernel times. No Megatron is imported."""
