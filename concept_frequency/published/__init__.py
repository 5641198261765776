"""The paper's numbers, the authors' published files, and what our code computes from these files."""
