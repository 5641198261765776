"""ProtoCLIP (arXiv 2206.10996)."""

import shared

shared.tell_missing_packages(__name__)
