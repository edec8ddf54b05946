"""Sources of prompts and seed data: the tiny world, whose oracle knows the ground truth, and English data."""
