"""Machines, GPUs, packages: what there is to train with."""
