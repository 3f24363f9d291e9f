"""Reverse engineering: thoughts, plans and settings written back into conversations by a language model."""
