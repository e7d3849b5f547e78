"""From what is seen and heard to feature vectors."""
