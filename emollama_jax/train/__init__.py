"""Training: what changes the adapters, one step at a time."""
