"""Planning of a run without a GPU: the memory, operations and time of a training step."""
