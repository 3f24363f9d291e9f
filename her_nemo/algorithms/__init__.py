"""Losses, advantages and divergences: pure functions on tensors. No config object, no distributed call.

Per-token tensors have shape [B, T] with T = S - 1: index t is the prediction of token t + 1. A mask is 1 on
the tokens that count (the reply) and 0 elsewhere; whatever stands under a 0, NaN included, has no influence
on a value or a gradient. Losses return a sum and a count: the caller divides by the count of the global
batch.
"""
