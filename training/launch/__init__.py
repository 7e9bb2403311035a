"""Starts the one command, and says how it ended."""
