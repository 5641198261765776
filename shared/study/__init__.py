"""Studies: the arms of a paper trained side by side, compared by seed, and reported."""
