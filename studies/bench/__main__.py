"""`make bench`: the benches of all folders, one after the other, as one table.

Compares with the authors' code if --clones has a clone under its repository's name, and always with open_clip.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from shared import run
from studies.bench import HEAD

CLONES = {
    "protoclip": "protoclip",
    "attentive_mask_clip": "A-CLIP",
    "tinyclip": "TinyCLIP",
    "flame": "FLAME",
    "lexvla": None,  # the authors have released no code
    "tldr_reduction": "datacentric.vlp",
    "nmtune": "Noisy-Model-Learning",
    "concept_frequency": "frequency_determines_performance",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=Path, help="folder of clones of the authors' repositories")
    parser.add_argument("--only", nargs="*", choices=list(CLONES), default=list(CLONES), help="folders to measure")
    parser.add_argument(
        "--results", type=Path, help="folder for the tables, FOLDER.md, which `make readme` puts into the READMEs"
    )
    options = parser.parse_args()
    if options.clones is not None and not options.clones.is_dir():
        parser.error(f"--clones {options.clones} is no folder")
    head, rule = HEAD.split("\n")
    print(f"{run.machine()}\n\n| folder {head}\n| --- {rule}", flush=True)
    rest, failed = [], []
    for folder in options.only:
        clone = options.clones and CLONES[folder] and options.clones / CLONES[folder]
        upstream = ["--upstream", str(clone)] if clone and clone.is_dir() else []
        results = ["--results", str(options.results / f"{folder}.md")] if options.results else []
        command = [sys.executable, "-m", f"studies.bench.{folder}", *upstream, *results]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
            wide = len(head.split("|"))
            for line in map(str.rstrip, bench.stdout):
                if line.startswith("|") and len(line.split("|")) == wide:
                    if line not in (head, rule):
                        print(f"| {folder} {line}", flush=True)
                elif line:
                    rest.append(f"{folder}: {line}" if not line.startswith("|") else line)
        if bench.returncode:
            failed.append(folder)
    print("\n" + "\n".join(rest))
    if failed:
        sys.exit(f"the benches of {', '.join(failed)} did not end well")


if __name__ == "__main__":
    main()
