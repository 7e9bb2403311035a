"""Tokenizer, model, packed attention, loss, answers."""
