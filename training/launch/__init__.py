"""Starts the trainer on one machine or on a Spark cluster, and says how it ended."""
