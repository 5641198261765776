"""LexVLA: Unified Lexical Representation for Interpretable Visual-Language Alignment (arXiv 2407.17827)."""
