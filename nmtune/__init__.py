"""NMTune: noisy model learning (arXiv 2309.17002)."""

import shared

shared.tell_missing_packages(__name__)
