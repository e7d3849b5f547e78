"""Flax NNX modules: shapes and logical axis names, nothing of files, data or training."""
