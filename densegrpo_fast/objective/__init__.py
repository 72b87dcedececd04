"""Objective: from log-probabilities and advantages to one loss; one file per idea."""
