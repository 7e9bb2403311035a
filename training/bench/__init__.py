"""Benchmark of padded against packed training."""
