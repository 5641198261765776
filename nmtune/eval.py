from nmtune.analysis import *  # noqa
