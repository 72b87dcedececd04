"""The mathematics of flow-matching GRPO: schedules, SDE steps, noise, log-probabilities, loss. Torch only."""
