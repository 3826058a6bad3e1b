"""What a run needs and how long it may take, from plain integers: no Megatron, no GPU, nothing measured."""
