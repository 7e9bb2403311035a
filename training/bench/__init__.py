"""Padded against packed training, measured."""
