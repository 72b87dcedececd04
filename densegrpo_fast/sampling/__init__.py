"""Trajectories: the stochastic rollout and the deterministic lookahead from each of its states."""
