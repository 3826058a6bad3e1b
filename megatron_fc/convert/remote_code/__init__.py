"""Code that `megatron-fc convert to-hf` puts beside the weights of a connected model; it imports nothing of ours."""
