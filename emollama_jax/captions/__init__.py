"""Annotations in the manner of MERR, made out of raw clips: what is seen, heard and said, a label, and captions."""
