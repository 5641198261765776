"""What all papers share: data, zero-shot evaluation, process setup and the embedded emoji corpus."""

import sys

if sys.platform == "win32":  # no fcntl, by which processes lock what they share
    print(
        "error: this runs on Linux and macOS; on Windows start it in the Windows Subsystem for Linux", file=sys.stderr
    )
    sys.exit(2)
