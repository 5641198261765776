"""`python -m faulty FAULT MODULE ARGUMENTS...`: a script in a world that is against it, for test_faults.py."""

import errno
import os
import resource
import runpy
import socket
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


def no_network() -> None:
    """Every connection fails, as every name does."""

    def fail(*_, **__):
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    socket.socket.connect = socket.create_connection = socket.getaddrinfo = fail


def full_disk(room: str = "300000") -> None:
    """No file can grow beyond so many bytes: logs fit, checkpoints do not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))


def at_step(step: int, action) -> None:
    """Run `action(images)` before the step-th time that an image tower reads a training batch."""
    seen = 0

    def hook(module: nn.Module, inputs: tuple):
        nonlocal seen
        if not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            return None
        if torch.is_grad_enabled() or not module.weight.requires_grad:  # trained, or a frozen tower's
            seen += 1
            if seen == step:
                return action(*inputs)

    register_module_forward_pre_hook(hook)


def nan(step: str) -> None:
    """One batch of images holds a NaN."""

    def spoil(images: torch.Tensor):
        images = images.clone()
        images[0, 0, 0, 0] = torch.nan
        return (images,)

    at_step(int(step), spoil)


def vanish(step: str, path: str) -> None:
    """A file is gone from that batch on."""
    at_step(int(step), lambda _: os.remove(path))


def pause(step: str, path: str) -> None:
    """Before that batch, make the file `path` and wait until it is gone."""

    def wait(_) -> None:
        Path(path).touch()
        while os.path.exists(path):
            time.sleep(0.01)

    at_step(int(step), wait)


def read_only(path: str) -> None:
    """Nothing under `path` can be made or changed (root is not held back by permissions)."""

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if (writes or event in ("os.mkdir", "os.rename", "os.remove")) and str(arguments[0]).startswith(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    sys.addaudithook(watch)


if __name__ == "__main__":
    fault, module, *arguments = sys.argv[1:]
    name, *options = fault.split(",")
    {each.__name__: each for each in (no_network, full_disk, nan, vanish, pause, read_only)}[name](*options)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
