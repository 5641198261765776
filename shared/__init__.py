"""What all papers share: data loading, zero-shot evaluation, and the run folder around them."""

import os
import sys
from types import TracebackType

if sys.platform == "win32":  # no fcntl, which file locks need
    print(
        "error: this runs on Linux and macOS; on Windows start it in the Windows Subsystem for Linux", file=sys.stderr
    )
    sys.exit(2)


def tell_missing_packages(extra: str) -> None:
    """Replace `sys.excepthook`: on a missing package, print the command that installs it and exit with code 2.

    extra: name of the extra in pyproject.toml that has the package, for a paper its folder's name. A paper's
    __init__.py calls this before any import that may fail.
    """
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or package in ("", extra, "shared"):
            return shown(kind, error, trace)
        install = f"pip install '.[{extra.replace('_', '-')}]'"
        print(f"error: package {package} is missing; in the project's folder: {install}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)  # after an excepthook, Python itself exits with 1

    sys.excepthook = hook
