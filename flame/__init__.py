"""FLAME: frozen large language models as text encoders (arXiv 2411.11927)."""

import shared

shared.tell_missing_packages(__name__)
