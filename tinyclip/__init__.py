"""TinyCLIP (arXiv 2309.12314)."""
