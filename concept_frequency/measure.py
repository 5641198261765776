"""Score every concept of a test set with any CLIP model: `python -m concept_frequency.measure MODEL --sets SET...`

    python -m concept_frequency.measure 'ViT-B-32|laion400m' --sets /data/wds_imagenet1k /data/wds_cifar10 --out results
    python -m concept_frequency.measure 'RN50|cc3m' --pretrained clip_RN50_CC3M_from_cyclip.pt --sets
    /data/wds_mscoco_captions

Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:src/zero_shot_eval.py`, `U:src/retrieval_eval.py`.
Writes their JSON: `<set>_<prompts>_results.json` with percent, `<set>_<t2i|i2t>_k=<k>_results.json` with fractions.
Sets are in the CLIP-benchmark layout; a set's own templates are the `ensemble`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as transforms
import tyro
from torch import Tensor, nn

from concept_frequency import train
from concept_frequency.concepts import caption_concepts, load_json, model_key
from concept_frequency.config import MODELS
from concept_frequency.eval import concept_recall, per_class_accuracy
from shared import checkpoints, cli, run
from shared.evalsets import EvalSet
from shared.zeroshot import build_classifier, encode_texts, extract_image_features

PROMPTS = {"class": ["{c}"], "simple": ["A photo of a {c}."]}


@dataclasses.dataclass
class Config:
    """One model, any number of sets."""

    model: Annotated[str, tyro.conf.Positional]
    """A model of the paper (`RN50|cc3m`), an open_clip name (`ViT-B-32`), or a run folder of ours."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark layout: classification, or retrieval with as many captions an image."""
    pretrained: str = ""
    """open_clip's tag or a checkpoint file (open_clip's, CyCLIP's, SLIP's layout); none: the paper's tag."""
    label: str = ""
    """Name BACKBONE|CORPUS in the results; none: the model's."""
    prompts: tuple[str, ...] = ("class", "simple", "ensemble")
    """class: `{c}`, simple: `A photo of a {c}.`, ensemble: the set's templates."""
    k: tuple[int, ...] = (1, 5, 10)
    """Recall at these."""
    min_images: int = 10
    """Nouns of captions are concepts if they are in so many images."""
    spacy: str = "en_core_web_lg"
    """Pipeline that finds these nouns."""
    out: str = "runs/concept_frequency/scores"
    """Folder of the results; those of other models in its files stay."""
    batch_size: int = 256
    """Images or prompts a forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """Autocast of the encoders."""


# --------------------------------------------------------------------------------------------------------------- models


def load_model(name: str, pretrained: str, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
    """(model in eval mode, image transform, tokenizer) of an open_clip model, a checkpoint file, or a run folder."""
    if (Path(name) / "checkpoint.pt").is_file():
        model, transform, tokenizer = _run_folder(Path(name))
    elif Path(pretrained).is_file():
        model, transform, tokenizer = _checkpoint(name, pretrained)
    else:
        if open_clip.get_model_config(name) is None and not name.startswith("hf-hub:"):
            raise ValueError(f"model {name!r} is no open_clip config, no model of the paper and no run folder")
        try:
            model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained or None)
        except RuntimeError as error:
            raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error
        tokenizer = open_clip.get_tokenizer(name)
    return model.to(device).eval(), transform, tokenizer


def _run_folder(folder: Path) -> tuple[nn.Module, Callable, Callable]:
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    cfg = checkpoints.config_in(state, train.Config, folder)
    model = train.create_model(cfg.model, cfg.image_size)
    model.load_state_dict(state["state_dict"])
    side, plain = train.image_side(model), torch.full((1, train.NOISE), 0.5)

    def transform(image) -> Tensor:
        pixels = torch.from_numpy(np.array(image.resize((train.SIDE, train.SIDE)))).permute(2, 0, 1)
        return train.views(pixels[None], plain, side)[0]

    return model, transform, open_clip.get_tokenizer(cfg.model, context_length=model.context_length)


def _checkpoint(name: str, path: str) -> tuple[nn.Module, Callable, Callable]:
    """Weights in open_clip's layout, under `state_dict` or not, with `module.` before them or not; or SLIP's."""
    with torch.serialization.safe_globals(checkpoints.AUTHORS_GLOBALS):  # SLIP keeps its arguments and learning rates
        state = checkpoints.load_checkpoint(path)
    weights = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
    if "image_projection" in weights:
        return slip(weights)
    model, _, transform = open_clip.create_model_and_transforms(name, load_weights=False)
    _load(model, weights, path, name)
    return model, transform, open_clip.get_tokenizer(name)


def _load(model: nn.Module, weights: dict[str, Tensor], path: str, name: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()[:200]
        raise ValueError(f"{path} does not hold the weights of {name}: {why}") from error


def slip(weights: dict[str, Tensor]) -> tuple[nn.Module, Callable, Callable]:
    """CLIP of the SLIP repository, ViT-B-16 in the paper, as an open_clip model on timm's vision transformer.

    Source: U:src/slip/models.py. Projections are matrices (width, embed_dim); QuickGELU in the text tower.
    """
    width, layers = weights["ln_final.weight"].shape[0], {key.split(".")[2] for key in weights if ".resblocks." in key}
    size = {384: "small", 768: "base", 1024: "large"}[weights["visual.cls_token"].shape[-1]]
    context, vocabulary = len(weights["positional_embedding"]), len(weights["token_embedding.weight"])
    side = 16 * round((weights["visual.pos_embed"].shape[1] - 1) ** 0.5)
    vision = {"timm_model_name": f"vit_{size}_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
    text = {"context_length": context, "vocab_size": vocabulary, "width": width, "heads": width // 64}
    model = open_clip.CustomTextCLIP(
        weights["text_projection"].shape[1],
        vision | {"image_size": side},
        text | {"layers": len(layers)},
        quick_gelu=True,
    )
    state = {"logit_scale": weights["logit_scale"], "text.text_projection": weights["text_projection"]}
    for key, value in weights.items():
        if key == "image_projection":
            state["visual.head.proj.weight"] = value.T
        elif key.startswith("visual."):
            state[f"visual.trunk.{key.removeprefix('visual.')}"] = value
        elif key.startswith(("transformer.", "token_embedding.", "positional_embedding", "ln_final.")):
            state[f"text.{key}"] = value
    _load(model, state, "the checkpoint", "SLIP's CLIP")
    transform = transforms.Compose(
        [
            transforms.Resize(side),
            transforms.CenterCrop(side),
            transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return model, transform, open_clip.SimpleTokenizer(context_length=context)


# ----------------------------------------------------------------------------------------------------------- evaluation


def classify(
    model: nn.Module, tokenizer: Callable, features: Tensor, labels: Tensor, classnames: list[str],
    templates: list[str], batch_size: int, device: torch.device, dtype: torch.dtype,
) -> dict:  # fmt: skip
    """{"full": percent, "classwise": {name: percent}}; a class without test images is left out."""
    classifier = build_classifier(model.encode_text, tokenizer, classnames, templates, batch_size, device, dtype)
    percent, per_class = per_class_accuracy(F.normalize(features, dim=-1) @ classifier, labels)
    named = zip(classnames, per_class.tolist(), strict=True)
    return {"full": percent, "classwise": {name: value for name, value in named if value == value}}


def retrieve(images: Tensor, texts: Tensor, docs: list, ks: tuple[int, ...], min_images: int) -> dict[str, dict]:
    """{"t2i_k=1": {"full": fraction, "conceptwise": ...}, ...} with concepts from the captions' nouns."""
    concepts = caption_concepts(docs, min_images, len(texts) // len(images))
    found = {}
    for k in ks:
        t2i, i2t, by_text, by_image = concept_recall(images, texts, concepts, k)
        found[f"t2i_k={k}"] = {"full": t2i, "conceptwise": by_text}
        found[f"i2t_k={k}"] = {"full": i2t, "conceptwise": by_image}
    return found


def write(folder: Path, title: str, key: str, result: dict) -> None:
    """Add a model's result to a file in the authors' layout."""
    path = folder / f"{title}_results.json"
    checkpoints.write_json(path, (load_json(path) if path.exists() else {}) | {key: result})


def main(cfg: Config) -> None:
    process = run.setup(0, cfg.device)
    if not cfg.sets:
        raise ValueError("--sets is missing: name evaluation sets in the CLIP-benchmark layout")
    if unknown := set(cfg.prompts) - {*PROMPTS, "ensemble"}:
        raise ValueError(f"--prompts are class, simple and ensemble, not {unknown.pop()}")
    name, tag = MODELS.get(cfg.model, (cfg.model, ""))
    if cfg.model in MODELS and not (cfg.pretrained or tag):
        raise ValueError(f"{cfg.model} is not among open_clip's weights: name its checkpoint with --pretrained FILE")
    model, transform, tokenizer = load_model(name, cfg.pretrained or tag, process.device)
    dtype = run.DTYPES[run.resolve_precision(cfg.precision, process.device)]
    weights = Path(cfg.pretrained or "random").stem
    label = cfg.label or (cfg.model if "|" in cfg.model else f"{Path(name).name}|{weights}")
    key, out = model_key(label), Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    for folder in cfg.sets:
        evaluation = EvalSet(folder, transform)
        loader = evaluation.batches(cfg.batch_size, cfg.workers)
        features, targets = extract_image_features(model.encode_image, loader, process.device, dtype, evaluation.name)
        if evaluation.kind == "retrieval":
            from concept_frequency.captions import load_spacy

            n = min(5, *map(len, targets))  # the first five of each image, as upstream
            captions = [caption for of_image in targets for caption in of_image[:n]]
            texts = encode_texts(model.encode_text, tokenizer, captions, cfg.batch_size, process.device, dtype)
            docs = [[(t.lemma_, t.pos_) for t in doc] for doc in load_spacy(cfg.spacy).pipe(captions, disable=["ner"])]
            for title, result in retrieve(features, texts, docs, cfg.k, cfg.min_images).items():
                write(out, f"{evaluation.name}_{title}", key, result)
                print(f"{evaluation.name} {title}: {result['full']:.3f}, {len(result['conceptwise'])} concepts")
            continue
        for prompts in cfg.prompts:
            templates = PROMPTS.get(prompts, evaluation.templates)
            result = classify(
                model, tokenizer, features, targets, evaluation.classnames, templates, cfg.batch_size, process.device,
                dtype,
            )  # fmt: skip
            write(out, f"{evaluation.name}_{prompts}", key, result)
            print(f"{evaluation.name} {prompts}: {result['full']:.2f} %, {len(result['classwise'])} concepts")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
