"""Rows, token ids with layer masks, and batches; and the miniature world."""
