"""How good answers are: metrics, benchmarks with their published rows, reports, and the judge of free-form answers."""
