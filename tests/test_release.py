"""One version everywhere; versions of packages that the committed results were made with."""

import re
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = sorted((ROOT / "results").glob("*_packages.txt"))


@pytest.mark.parametrize(("locked", "folder"), [("1", "protoclip"), ("tldr-reduction", "tldr_reduction")])
def test_locked_versions_replace_others(tmp_path: Path, locked: str, folder: str):
    """With LOCKED=FOLDER an environment that has been made without it is installed again."""
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", ".installed-base"):
        (tmp_path / name).touch()
    command = ["make", "--dry-run", f"{tmp_path}/.installed-base", f"VENV={tmp_path}"]
    plain, made = (
        subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for more in ([], [f"LOCKED={locked}"])
    )
    versions = f"{tmp_path}/locked-{folder}.txt"
    assert " -e " not in plain
    assert f"results/{folder}_packages.txt > {versions}" in made and f"-c {versions} -e ." in made


def test_locked_versions_of_no_paper_are_refused():
    made = subprocess.run(["make", "install", "LOCKED=clip"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and "LOCKED=clip: not 1 or one of attentive_mask_clip" in made.stderr


def test_one_version():
    newest = r"^## (\d\S+)"  # the first version after what is not released yet
    patterns = {"pyproject.toml": r'^version = "(.+)"', "CITATION.cff": r"^version: (.+)", "CHANGELOG.md": newest}
    found = {re.search(pattern, (ROOT / name).read_text("utf-8"), re.M)[1] for name, pattern in patterns.items()}
    assert len(found) == 1, found


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.stem)
def test_versions_of_the_results_can_be_installed(path: Path):
    """They fit what the project asks for, except the extra that needs an older NumPy."""
    lines = (line.split("==") for line in path.read_text().splitlines())
    locked = {canonicalize_name(name): version.partition("+")[0] for name, version in lines}
    for wanted in map(Requirement, requires("paper-clips")):
        version = locked.get(canonicalize_name(wanted.name))
        if version and 'extra == "clip-benchmark"' not in str(wanted.marker):
            assert wanted.specifier.contains(version), (str(wanted), version)
    assert "torch" in locked and "open-clip-torch" in locked
