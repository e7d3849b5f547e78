"""Speed and memory on this machine, beside the same work done by a peer in the same run.

Weights are random: speed does not depend on them.
"""
