"""The loop as a run on disk: config, files, journals, resuming, experiments."""
