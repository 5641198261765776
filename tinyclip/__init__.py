"""TinyCLIP (arXiv 2309.12314)."""

import shared

shared.tell_missing_packages(__name__)
