"""Where prompts, seed data and, where it can be known, ground truth come from."""
