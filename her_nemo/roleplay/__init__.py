"""What a turn is and who may see it. No torch, no input or output."""
