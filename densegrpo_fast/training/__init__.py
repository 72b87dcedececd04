"""One GRPO iteration and its parts: prompts, rollout, lookahead, rewards, credit, update."""
