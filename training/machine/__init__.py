"""The machine: GPUs and their peak speed, memory and disk, installed packages and compilers."""
