"""Attentive Mask CLIP (arXiv 2212.08653)."""
