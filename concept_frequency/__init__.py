"""No "Zero-Shot" Without Exponential Data: see README.md."""

import shared

shared.tell_missing_packages(__name__)
