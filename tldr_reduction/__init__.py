"""TL;DR: data reduction for vision-language pre-training (arXiv 2305.20087)."""
