"""No "Zero-Shot" Without Exponential Data: see README.md."""
