"""One file a stage, each read from top to bottom; `run(cfg)` is its only entry."""
