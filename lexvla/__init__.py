"""LexVLA: Unified Lexical Representation for Interpretable Visual-Language Alignment (arXiv 2407.17827)."""

import shared

shared.tell_missing_packages(__name__)
