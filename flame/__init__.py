"""FLAME: frozen large language models as text encoders (arXiv 2411.11927)."""
