"""Tokenizer, model, packed attention, loss, and generation."""
