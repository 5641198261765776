"""Small towers for tests of scripts, where models matter little. Text towers are 16 to 32 wide, since most of the time
goes into initialising, checking and writing the embeddings of 49,408 tokens. The server of scripts.py has these towers,
too; `python -m small_models MODULE ARGUMENTS...` runs a script with them in a new process.

Names: `ViT-test` and `ResNet-test` of open_clip, `test` of A-CLIP, `test-100`, `test-50`, `test-25`, `test-convnet-100`
and so on of TinyCLIP. ResNet-test is for fp32: in bf16, its convolutions have gradients that are NaN on some CPUs.
"""

import runpy
import sys
from pathlib import Path

import open_clip

import attentive_mask_clip.model
import shared.run  # noqa: F401  (adds the configs of the emoji-scale towers)
import tinyclip.geometry

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
open_clip.add_model_config(Path(__file__).parent / "model_configs")
aclip = dict(vision_width=32, vision_heads=2, embed_dim=32, text_width=16, text_heads=2, text_layers=1, ssl_hidden=64)
attentive_mask_clip.model.PRESETS["test"] = attentive_mask_clip.model.PRESETS["emoji"] | aclip
for share, width, text_width, layers in ((100, 32, 32, 2), (50, 24, 32, 1), (25, 16, 16, 1)):
    vision = {"image_size": 40, "patch_size": 8, "width": width, "layers": 2, "head_width": 8}
    convolutional = {"image_size": 32, "width": width / 64, "layers": [1, 1, 1, 1], "block": "convolution"}
    text = TEXT | {"width": text_width, "heads": text_width // 8, "layers": layers}
    for name, tower in ((f"test-{share}", vision), (f"test-convnet-{share}", convolutional)):
        tinyclip.geometry.CONFIGS[name] = {"embed_dim": 32, "vision": tower, "text": text}

if __name__ == "__main__":
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
