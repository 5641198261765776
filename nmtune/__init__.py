"""NMTune: noisy model learning (arXiv 2309.17002)."""
