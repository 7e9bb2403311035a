"""From a data file to batches: rows, prompts, tokens, batches."""
