"""The synthetic data set: drawn faces, synthesised voices and sentences, in MERR's own layout."""
