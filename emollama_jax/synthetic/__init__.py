"""The synthetic data set: drawn faces, synthesised voices and sentences, in the file layout of MERR."""
