"""`python -m watched SCRIPT ARGUMENTS`: run a script, then print its peak GPU memory in GiB and how often it waited for
the GPU."""

import runpy
import sys
import warnings

import torch


def main() -> None:
    module, sys.argv = sys.argv[1], sys.argv[1:]
    waits: list[str] = []
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def show(message, category, file, line, *rest) -> None:
            if "synchronizing CUDA operation" in str(message):
                waits.append(f"{file}:{line}")
            else:
                shown(message, category, file, line, *rest)

        warnings.showwarning = show
    sys.modules.pop(module, None)  # the server has imported it; a script runs its module anew
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
    print(f"peak {peak:.3f} GiB, waited {len(waits)} times: {', '.join(sorted(set(waits)))}")


if __name__ == "__main__":
    main()
