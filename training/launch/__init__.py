"""Starts the trainer on one machine or on a Spark cluster, and explains its exit code."""
