"""The only room that imports megatron-core: model, parallelism, forward and backward, weights, optimizer, state."""
