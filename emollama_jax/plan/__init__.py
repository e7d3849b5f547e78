"""Ahead-of-time plans: an experiment's own programs are compiled for a named TPU or GPU topology, without the hardware,
and the compiler's account of memory and communication becomes a plan.

All figures are compiler estimates, none are measurements.
"""
