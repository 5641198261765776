"""NMTune's small data and scripts, for its tests."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT, ended, finished, metrics, start_two

from nmtune import datasets
from shared import checkpoints


@pytest.fixture(scope="module", autouse=True)
def corpus(embedded_corpus: None):
    os.chdir(ROOT)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """48 real drawings of four groups as image folders."""
    root, chosen = tmp_path_factory.mktemp("images"), datasets.open_labelled("data/emoji/eval/groups_id:test")
    for label in range(4):
        folder = root / f"class{label}"
        folder.mkdir()
        for row in np.flatnonzero(chosen.labels == label)[:12]:
            chosen.read(row)[0].save(folder / f"{row}.png")
    return root


@pytest.fixture
def in_process(in_process):
    """Run a script's command line in this process -> (exit code, stdout, stderr)."""
    return lambda module, *arguments: in_process(*arguments, module=module)


@pytest.fixture(scope="module")
def start(start):
    """start(module, *arguments) starts a script."""
    return lambda module, *arguments, **environment: start(*arguments, module=module, **environment)


def one_sentence(err: str) -> bool:
    lines = [line for line in err.splitlines() if "WARNING" not in line]
    return len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err


@pytest.fixture(scope="module")
def features_file(tmp_path_factory) -> Path:
    """Six separable classes with one view and no test set; the file has only an array and labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 300)
    x = rng.standard_normal((6, 24))[labels] + 0.5 * rng.standard_normal((300, 24))
    path = tmp_path_factory.mktemp("features") / "my_features.npz"
    np.savez(path, features=x, labels=np.array([f"class {label}" for label in labels]))
    return path


@pytest.fixture
def two(start):
    """two(module, *arguments, count=2) runs the script in `count` processes and waits for its end."""

    def two(module: str, *arguments, count: int = 2) -> None:
        for process in start_two(start, module, *arguments, count=count):
            finished(ended(process))

    return two


def assert_equal_runs(one: Path, other: Path, part: str) -> None:
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for name in a.keys() - {"accuracy_clean", "accuracy_noisy"}:  # of the local batch
            if isinstance(a[name], str):  # scores by picture
                assert a[name] == b[name]
                continue
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=2e-5, err_msg=f"{name} in step {a['step']}")
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")[part] for path in (one, other))
    for name in a:
        if name in ("mlp_after.0.bias", "mlp_after.1.running_mean"):
            continue  # true gradient 0, of which AdamW makes steps from rounding
        x, y = b[name], a[name]
        if name.endswith("in_proj_bias"):  # so is that of the keys' bias
            x, y = (bias.unflatten(0, (3, -1))[[0, 2]] for bias in (x, y))
        apart = (x - y).abs() > 1e-4 * (1 + y.abs())  # one weight in ten thousand may have such a gradient, too
        assert apart.float().mean() <= 1e-4, f"{name}: {apart.sum()} of {apart.numel()} differ"
        torch.testing.assert_close(x, y, rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
