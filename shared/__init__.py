"""What all papers share: data, zero-shot evaluation, process setup and the embedded emoji corpus."""

import os
import sys
from types import TracebackType

if sys.platform == "win32":  # no fcntl, by which processes lock what they share
    print(
        "error: this runs on Linux and macOS; on Windows start it in the Windows Subsystem for Linux", file=sys.stderr
    )
    sys.exit(2)


def tell_missing_packages(paper: str) -> None:
    """From now on a package that is not there ends in a sentence with the line that installs it, and exit code 2.

    Called by the __init__.py of a paper's folder, before any import that may fail.
    """
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or package in ("", paper, "shared"):
            return shown(kind, error, trace)
        install = f"pip install '.[{paper.replace('_', '-')}]'"
        print(f"error: package {package} is missing; in the project's folder: {install}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # an excepthook has no other exit code than 1

    sys.excepthook = hook
