"""Benchmarks of speed and memory on this machine, each beside a peer that does the same work in the same run.

Weights are random: speed does not depend on them.
"""
