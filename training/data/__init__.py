"""Rows, prompts, tokens, batches."""
