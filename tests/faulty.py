"""`python -m faulty FAULT MODULE ARGUMENTS...`: run a script under a fault, for test_faults.py."""

import builtins
import errno
import io
import os
import resource
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


def no_network() -> None:
    """All connections and name look-ups fail, except connections to loader workers."""
    connect = socket.socket.connect

    def fail(*arguments, **__):
        if getattr(arguments[0], "family", None) == socket.AF_UNIX:
            return connect(*arguments)
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    socket.socket.connect = socket.create_connection = socket.getaddrinfo = fail


def full_disk(room: str = "300000") -> None:
    """No file can grow beyond `room` bytes: logs fit, checkpoints do not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))


class Full(io.FileIO):
    """A file on a disk that becomes full after a number of writes."""

    left = 0

    def write(self, content) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        return super().write(content)


def no_space(name: str, left: str) -> None:
    """The disk is full after `left` writes to a file called `name`."""
    Full.left, original = int(left), io.open

    def opened(file, mode: str = "r", *rest, **options):
        if os.path.basename(str(file)) == name and mode == "a+":
            return io.TextIOWrapper(io.BufferedRandom(Full(file, mode)))
        return original(file, mode, *rest, **options)

    builtins.open = io.open = opened


def die_saving(count: str) -> None:
    """Kill the process when the count-th checkpoint has been written but not yet renamed to checkpoint.pt."""
    left, original = int(count), os.replace

    def replace(source, target) -> None:
        nonlocal left
        left -= os.path.basename(target) == "checkpoint.pt"
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    os.replace = replace


def at_step(step: int, action) -> None:
    """Run `action(images)` before an image tower reads its `step`-th training batch."""
    seen = 0

    def hook(module: nn.Module, inputs: tuple):
        nonlocal seen
        if not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            return None
        if torch.is_grad_enabled() or not module.weight.requires_grad:  # not an evaluation of a trained tower
            seen += 1
            if seen == step:
                return action(*inputs)

    register_module_forward_pre_hook(hook)


def nan(step: str, path: str) -> None:
    """Put a NaN into the images of batch `step`; the file `path` shows that the batch was read."""

    def spoil(images: torch.Tensor):
        Path(path).touch()
        images = images.clone()
        images[0, 0, 0, 0] = torch.nan
        return (images,)

    at_step(int(step), spoil)


def vanish(step: str, path: str) -> None:
    """Delete the file `path` before batch `step`."""
    at_step(int(step), lambda _: os.remove(path))


def pause(step: str, path: str) -> None:
    """Before batch `step`, create the file `path` and wait until it is deleted."""

    def wait(_) -> None:
        Path(path).touch()
        while os.path.exists(path):
            time.sleep(0.01)

    at_step(int(step), wait)


def read_only(path: str) -> None:
    """Nothing under `path` can be written (permissions do not restrict root)."""

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if (writes or event in ("os.mkdir", "os.rename", "os.remove")) and str(arguments[0]).startswith(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    sys.addaudithook(watch)


if __name__ == "__main__":
    fault, module, *arguments = sys.argv[1:]
    name, *options = fault.split(",")
    faults = (no_network, full_disk, no_space, die_saving, nan, vanish, pause, read_only)
    {each.__name__: each for each in faults}[name](*options)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # the server has imported it; a script runs its module anew
    runpy.run_module(module, run_name="__main__", alter_sys=True)
