"""TL;DR: data reduction for vision-language pre-training (arXiv 2305.20087)."""

import shared

shared.tell_missing_packages(__name__)
