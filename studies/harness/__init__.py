"""Studies: train the arms of a paper in parallel, compare them by seed, and report the results."""
