"""What a run writes and reads: its directory, checkpoints, metrics, loggers, alarms, report and model card."""
