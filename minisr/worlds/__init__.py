"""Sources of prompts and seed data: the tiny world and the words world, whose oracles know the ground truth, and
English data. catalog.py lists the worlds with an oracle."""
