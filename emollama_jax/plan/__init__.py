"""What an experiment needs of devices that are not there: its real programs are compiled for a named topology, and the
compiler's own account of memory and communication becomes a plan.

All figures are compiler estimates, none are measurements.
"""
