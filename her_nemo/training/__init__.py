"""What every training loop shares: checkpoints, metrics, signals and the optimizer step."""
