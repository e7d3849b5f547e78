"""Generation, and what is built on it."""
