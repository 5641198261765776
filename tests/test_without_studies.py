"""The papers run without studies/."""

import json
import shutil
import textwrap
from pathlib import Path

from scripts import ROOT, ended
from short_runs import FOLDERS, small_corpus, small_set

SCRIPT, SECONDS = "driver", 200


def test_papers_run_without_their_studies(embedded_corpus: None, start, tmp_path: Path, monkeypatch):
    """In a copy without studies/, all modules of the papers can be imported, and one paper trains and evaluates.

    The process is a fork of the tests' server, which has imported the other libraries. It drops the project's modules.
    """
    copy = tmp_path / "copy"
    for package in ("shared", *FOLDERS):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignore)
    (copy / "data").symlink_to(ROOT / "data")
    corpus, out = small_corpus(tmp_path / "corpus"), tmp_path / "runs/protoclip"
    tiny = "--image-size 16 --episodes 1 --episode-size 64 --batch-size 32 --k 8 --niter 5 --nredo 1 --warmup 2"
    more = f"--w-external 0 --hidden-dim 32 --projection-dim 16 --workers 0 --eval-every 0 --precision fp32 {tiny}"
    sets = ["--probe", "--gap", "None", "--sets", small_set("names_id", tmp_path / "sets", every=40)]
    modules = [
        f"{package}.{path.stem}"
        for package in ("shared", *FOLDERS)
        for path in sorted((copy / package).glob("*.py"))
        if path.stem != "__init__"
    ]
    lines = [
        ["protoclip.train", "emoji", "--data", str(corpus), *more.split(), "--out", str(out)],
        ["protoclip.eval", str(out), *sets],
    ]
    driver = """
        import importlib, importlib.util, json, os, runpy, sys
        root, modules, lines = json.load(open(sys.argv[1]))
        sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
        sys.path[:] = [path for path in sys.path if os.path.abspath(path) not in (root, f"{root}/tests")]
        packages = {module.partition(".")[0] for module in modules}
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
        assert importlib.util.find_spec("studies") is None
        for module in modules:
            assert importlib.import_module(module).__file__.startswith(os.getcwd()), module
        for module, *words in lines:
            sys.argv = [module, *words]
            print(module, flush=True)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    """
    (copy / "driver.py").write_text(textwrap.dedent(driver))

    (copy / "lines.json").write_text(json.dumps([str(ROOT), modules, lines]))
    monkeypatch.chdir(copy)
    result = ended(start("lines.json", PYTHONPATH=str(copy)))
    shown = result.out[-2000:] + result.err[-4000:]
    assert [module for module, *_ in lines] == [line for line in result.out.splitlines() if line in modules], shown
    assert (out / "checkpoint.pt").is_file() and (out / "results.json").is_file(), shown
    assert result.code == 0, shown
