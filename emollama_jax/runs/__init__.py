"""Trained runs: their folders, checkpoints, weights, and what they were trained on."""
