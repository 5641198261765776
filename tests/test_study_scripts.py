"""Scripts of a study as forks of a server."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripts import ROOT

from studies.harness import scripts


def test_scripts_start_as_from_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """With the modules, arguments, environment and exit code of `python -m`; what they print comes out here."""
    monkeypatch.chdir(tmp_path)
    Path("helper.py").write_text("NAME = 'helper'\n")
    text = "import os, sys, helper\nprint(__name__, sys.argv[1:], os.environ['WORD'], helper.NAME)\nsys.exit(7)\n"
    Path("tool.py").write_text(text)
    assert scripts.run_script("tool", ["a", "--b", "c d"], {"WORD": "said"}) == 7
    assert capfd.readouterr().out == "__main__ ['a', '--b', 'c d'] said helper\n"
    Path("tool.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert scripts.run_script("tool", [], {}) == -9 and "WORD" not in os.environ
    Path("tool.py").write_text("import torch\nassert torch.ones(10**6).sum() == 10**6\n")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: scripts.run_script("tool", [], {}), range(12))) == [0] * 12


def test_a_study_starts_scripts_without_a_word(tmp_path: Path):
    """Its module is imported once by the server of forks, and not again as the main module of each script."""
    (tmp_path / "study.py").write_text(
        "import os, sys\nfrom studies.harness import scripts\nprint('imported', flush=True)\n"
        "if __name__ == '__main__':\n    sys.exit(scripts.run_script('tool', [], os.environ))\n"
    )
    (tmp_path / "tool.py").write_text("print('done')\n")
    ended = subprocess.run(
        [sys.executable, "-m", "study"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "" and ended.stdout == "imported\nimported\ndone\n"


@pytest.mark.parametrize(
    ("by", "at_first"),
    [(signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_IGN)],
    ids=["SIGINT", "SIGTERM", "SIGTERM where SIGINT is ignored"],
)
def test_an_interrupted_study_ends_with_its_scripts(tmp_path: Path, by: signal.Signals, at_first: signal.Handlers):
    """Although only the study gets the signal; a shell starts commands with & so that they ignore SIGINT."""
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/study.py").write_text(
        "from studies.harness.runner import Arm, Study, main\n"
        "arms = tuple(Arm(name, 'train', heading=name) for name in 'abc')\n"
        "STUDY = Study('paper', 'A paper', 'CC3M', arms, minutes={'core': 1}, evaluate=list, metrics={}, claims=())\n"
        "if __name__ == '__main__':\n    main(STUDY)\n"
    )
    (tmp_path / "paper/train.py").write_text(
        "import os, time\nopen(str(os.getpid()), 'w').close()\ntry:\n    time.sleep(100)\n"
        "except KeyboardInterrupt:\n    open('ended', 'a').write(f'{os.getpid()} ')\n"
    )
    study = subprocess.Popen(
        [sys.executable, "-m", "paper.study", "--seeds", "0", "--jobs", "2"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, at_first),
    )  # fmt: skip
    begun = lambda: {path.name for path in tmp_path.iterdir() if path.name.isdigit()}  # noqa: E731
    try:
        until = time.monotonic() + 60
        while len(begun()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(begun()) == 2
        study.send_signal(by)
        _, said = study.communicate(timeout=60)
    finally:
        study.kill()
    assert study.returncode == 130 and said.startswith("interrupted; finished work is kept"), said
    assert len(begun()) == 2 and not any(Path(f"/proc/{script}").exists() for script in begun())
    if at_first == signal.SIG_DFL:
        assert set((tmp_path / "ended").read_text().split()) == begun()
