"""Writes checkpoint files in the format of the authors' trainers: weights and training state."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn


def beside_weights(**more) -> dict:
    """The training state beside the weights: epoch, command line, gradient scaler, and AdamW's state after one step
    with a NumPy learning rate. The command line contains a path, like SLIP's (run_with_submitit.py:75)."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5 * (1 + np.cos(np.pi * 0.3)) * np.float32(5e-4)
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }
    args = argparse.Namespace(lr=np.float64(5e-4), betas=(0.9, 0.98), name=None, wandb=False, output_dir=Path("x"))
    return {"epoch": 3, "name": "x", "optimizer": optimizer.state_dict(), "scaler": scaler, "args": args} | more
