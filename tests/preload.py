"""Modules that a server imports once. Its forks are the tests' scripts and ranks, which thus need not wait seconds for
imports. A pytest process has one such server, started at the first fork, so this file imports all that any fork needs.
"""

import contextlib
import gc
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LATE = [  # imported inside functions, or by functions that run in ranks
    *("pytest", "sklearn.feature_extraction.text", "torch.utils.tensorboard", "safetensors.torch", "peft"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "dinov2", "llama")),
]
PATHS = [path for path in ROOT.glob("*/*.py") if path.parent.name == "shared" or path.with_name("model.py").is_file()]
OURS = [f"{path.parent.name}.{path.stem}" for path in sorted(PATHS) if "study" not in path.stem]

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
os.fsync = lambda descriptor: None  # what tests write need not survive a power cut
for name in [*LATE, *OURS, "tests.small_models"]:
    with contextlib.suppress(Exception):  # a test that needs the module reports the error
        importlib.import_module(name)
with contextlib.suppress(Exception):
    sys.modules["concept_frequency.captions"].load_spacy("en_core_web_sm")
with contextlib.suppress(Exception):
    importlib.import_module("tests.vocabulary").share()
gc.collect()
gc.freeze()  # the garbage collector of a fork skips these objects
