"""Around the loop: prompts, the run directory, checkpoints, metrics, signals, the adapter and the report."""
