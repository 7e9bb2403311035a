"""Metrics and sample answers written while a run trains."""
