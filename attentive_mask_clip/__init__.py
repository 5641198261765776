"""Attentive Mask CLIP (arXiv 2212.08653)."""

import shared

shared.tell_missing_packages(__name__)
