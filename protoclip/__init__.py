"""ProtoCLIP (arXiv 2206.10996)."""
