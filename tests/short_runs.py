"""One short run of every training script, a few seconds each on real emoji shards, for tests of all scripts.

`small_corpus` makes the data, `commands` the command lines without --out, `further` those of more arms, `stages` those
of the other scripts.
"""

import functools
import importlib
import io
import json
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import small_models  # noqa: F401  (the models named test)
import torch
from scripts import ROOT, SHARDS

from shared import checkpoints, presets
from shared.data import open_pairs
from shared.index import Strings
from tinyclip.geometry import CONFIGS
from tinyclip.model import CLIP

EVAL = ROOT / "data/emoji/eval"
FOLDERS = tuple(presets.folders())
SCRIPTS = {folder: f"{folder}.train" for folder in FOLDERS} | {"nmtune": "nmtune.pretrain"}
SCRIPTS |= {"tldr_reduction": "tldr_reduction.train", "tldr_reduction-clip": "tldr_reduction.train"}  # its two
FURTHER = {  # arms with more to save: a bank, states, LoRA, masks, a teacher, a queue, noisy labels
    "flame-bank": "flame.train", "lexvla-lm": "lexvla.train", "lexvla-dense": "studies.lexvla_dense",
    "nmtune-labels": "nmtune.pretrain", "protoclip-teacher": "protoclip.train", "tinyclip-masks": "tinyclip.train",
    "tldr_reduction-blip": "tldr_reduction.train",
}  # fmt: skip

# Towers without batch norms, which would normalise each micro-batch by itself. A large eps: else the rounding of a
# vanishing gradient becomes a visible step.
PLAIN = {
    "concept_frequency": [],
    "flame": ["--eps", "1e-4"],
    "lexvla": ["--eps", "1e-4"],
    "nmtune": ["--eps", "1e-4"],
    "protoclip": ["--model", "ViT-test", "--w-proto", "0", "--w-external", "0"],
    "tinyclip": ["--eps", "1e-4"],
}


def config(folder: str, script: str) -> type:
    """The settings class of a script with presets."""
    table = re.search(r"preset_cli\((\w+)\)", (ROOT / folder / f"{script}.py").read_text())[1]
    found = getattr(importlib.import_module(f"{folder}.{script}"), table)
    return type(next(iter(found.values()))[1])


def small_corpus(folder: Path, pairs: int = 160, shards: int = 2) -> Path:
    """Write shards of the first pairs of the embedded corpus, with image, caption and metadata."""
    folder.mkdir(parents=True)
    with tarfile.open(SHARDS / "00000.tar") as source:
        samples: dict[str, list] = {}
        for member in source:
            samples.setdefault(member.name.partition(".")[0], []).append(member)
        keys = list(samples)[:pairs]
        for i in range(shards):
            with tarfile.open(folder / f"{i:05}.tar", "w") as target:
                for key in keys[i * pairs // shards : (i + 1) * pairs // shards]:
                    for member in samples[key]:
                        target.addfile(member, source.extractfile(member))
    return folder


@functools.cache
def set_files(name: str, every: int) -> dict[str, bytes]:
    """{path: content} of every n-th sample of one of the embedded corpus's evaluation sets; each is read once."""
    found = {}
    for path in (path for path in (EVAL / name).rglob("*") if path.is_file()):
        found[str(path.relative_to(EVAL / name))] = thinned(path, every) if path.suffix == ".tar" else path.read_bytes()
    return found


def thinned(shard: Path, every: int) -> bytes:
    """A shard with every n-th sample of another."""
    keys: dict[str, int] = {}
    with tarfile.open(shard) as source, tarfile.open(fileobj=(content := io.BytesIO()), mode="w") as tar:
        for member in source:
            if keys.setdefault(member.name.partition(".")[0], len(keys)) % every == 0:
                tar.addfile(member, source.extractfile(member))
    return content.getvalue()


def small_set(name: str, folder: Path, every: int = 8) -> str:
    """Write an evaluation set to `folder` with every n-th sample of one of the embedded corpus."""
    for path, content in set_files(name, every).items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_bytes(content)
    return str(folder / name)


def add_sample(shard: Path, key: str, image: bytes, caption: bytes, description: bytes | None = None) -> None:
    """Append a sample to a shard; by default with the metadata of the shard's first sample."""
    if description is None:
        with tarfile.open(shard) as tar:
            description = tar.extractfile(next(m for m in tar if m.name.endswith(".json"))).read()
    with tarfile.open(shard, "a") as tar:
        for extension, content in (("png", image), ("txt", caption), ("json", description)):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def language_model(folder: Path, data: Path, **sizes: int) -> Path:
    """Write a random Llama, by default with one small block, and a tokenizer trained on the captions, in transformers'
    format."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pairs, bpe = open_pairs(str(data)), ByteLevelBPETokenizer()
    captions = (" " + pairs.caption(row) for row in range(len(pairs)))
    bpe.train_from_iterator(captions, vocab_size=500, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    sizes = sizes or dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def dinov2(folder: Path, **sizes: int) -> Path:
    """Write a random DINOv2, by default of one small block, with patches of 8 pixels."""
    from transformers import Dinov2Config, Dinov2Model

    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8)
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**(sizes or small))).save_pretrained(folder)
    return folder


def write_bank(folder: Path, embeddings: torch.Tensor, keys: list[str], rows: list[int]) -> Path:
    """Write a bank of FLAME: embeddings (U, T, D) of captions, and the row of each sample in them."""
    folder.mkdir(exist_ok=True)
    about = {
        "llm": "a",
        "digest": "b",
        "mask": "decoupled",
        "precision": "fp32",
        "prompts": [["a {caption}", ["b"], False]] * 3,
    }
    checkpoints.write_json(folder / "index.json", about)
    names, done = Strings.of(keys), np.ones(1, dtype=bool)
    arrays = {
        "keys": names.text,
        "ends": names.ends,
        "rows": np.array(rows),
        "embeddings": embeddings.numpy(),
        "done": done,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def random_bank(folder: Path, data: Path) -> Path:
    """Write a bank with eleven random embeddings of 16 numbers for each sample."""
    keys = open_pairs(str(data)).keys.tolist()
    embeddings = torch.randn(len(keys), 11, 16, generator=torch.Generator().manual_seed(0))
    return write_bank(folder, torch.nn.functional.normalize(embeddings, dim=-1).half(), keys, list(range(len(keys))))


def clip_teacher(file: Path) -> Path:
    """Write a random CLIP for images of 16 pixels, as TinyCLIP reads teachers."""
    torch.manual_seed(0)
    sizes = CONFIGS["test-100"]
    model = CLIP(**sizes | {"vision": sizes["vision"] | {"image_size": 16}})
    torch.save({"state_dict": model.state_dict(), "geometry": model.geometry}, file)
    return file


def vocabulary(folder: Path, data: Path) -> Path:
    """Write a WordPiece vocabulary of the captions."""
    from tldr_reduction_ports import build_vocab

    pairs = open_pairs(str(data))
    words = build_vocab(pairs.caption(row) for row in range(len(pairs)))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder / "vocab.txt"


def commands(data: Path, parts: Path) -> dict[str, list[str]]:
    """Arguments of each folder's training script: the paper's method or its cheapest arm, ten steps, a checkpoint every
    two. `parts` is the folder of the files that they need."""
    arms = {
        "attentive_mask_clip": "emoji --model test --image-size 20 --epochs 2 --warmup-epochs 1",
        "concept_frequency": f"""emoji --model ViT-test --image-size 16 --num-concepts 12 --dataset-size 160 --epochs 2
            --warmup 2 --eval-set {EVAL}/names_ood""",
        "flame": "emoji-clip --captions --model ViT-test --image-size 16 --hidden-dim 32 --epochs 2 --warmup 2",
        "lexvla": f"""emoji-bow --lm {language_model(parts / "lm", data)} --backbone {dinov2(parts / "dinov2")}
            --states= --lora-rank 0 --no-encode-once --image-size 16 --adapter-width None --adapter-hidden 2048
            --min-count 1 --epochs 2 --warmup 2""",
        "nmtune": "small-clip --noise 0.3 --model ViT-test --no-keep-in-memory --epochs 2 --warmup 2",
        "protoclip": """emoji --model ResNet-test --w-external 0 --image-size 16 --episodes 2 --episode-size 160 --k 8
            --niter 5 --nredo 1 --hidden-dim 32 --projection-dim 16 --warmup 2""",
        "tinyclip": "emoji-teacher --model test-100 --image-size 16 --steps 10 --warmup 2 --no-keep-in-memory",
        "tldr_reduction": f"""small-captioner --vocab {vocabulary(parts, data)} --image-size 16 --patch-size 8
            --width 32 --layers 2 --heads 2 --text-width 32 --text-layers 1 --text-heads 2 --code-dim 16 --num-codes 32
            --epochs 2 --warmup 2""",
        "tldr_reduction-clip": f"""small-clip --clip-model ViT-test --vocab {parts / "vocab.txt"} --image-size 16
            --epochs 2 --warmup 2""",
    }
    common = f"--data {data} --precision fp32 --batch-size 32 --log-every 1 --save-every 2 --workers 0".split()
    evaluation = {name: ["--eval-every", "0"] for name in arms} | {"nmtune": [], "tldr_reduction": [], "lexvla": []}
    return {name: [*arms[name].split(), *common, *evaluation[name]] for name in arms}


def further(data: Path, parts: Path) -> dict[str, list[str]]:
    """Arguments of further arms; `parts` is the folder that `commands` filled."""
    teacher = clip_teacher(parts / "teacher.pt")
    lexvla = f"""--lm {parts}/lm --backbone {parts}/dinov2 --states {parts}/states.pt --cache {parts}/cache
        --image-size 16 --adapter-width None --adapter-hidden 2048 --lora-rank 2 --min-count 1 --eps 1e-4 --epochs 2
        --warmup 2 --penalty-warmup 4"""
    arms = {
        "flame-bank": f"""emoji --bank {random_bank(parts / "bank", data)} --captions --model ViT-test --image-size 16
            --hidden-dim 2048 --epochs 2 --warmup 2 --eps 1e-4 --eval-every 0""",
        "lexvla-lm": f"emoji {lexvla}",
        "lexvla-dense": f"emoji-dense {lexvla}",
        "nmtune-labels": "small-sup --noise 0.3 --epochs 4 --warmup 2",
        "protoclip-teacher": f"""emoji --model ViT-test --external-teacher {EVAL.parent / "teacher.npz"} --image-size 16
            --episodes 2 --episode-size 160 --k 8 --niter 5 --nredo 1 --hidden-dim 32 --projection-dim 16 --warmup 2
            --eval-every 0""",
        "tinyclip-masks": f"""emoji-auto --model test-100 --teacher {teacher} --init {teacher} --logit-scale 50
            --image-size 16 --steps 10 --warmup 2 --prune-step 5 --sparsity-warmup 2 --mask-lr 1.0 --lambda-lr -1.0
            --eval-every 0""",
        "tldr_reduction-blip": f"""small-blip --vocab {parts / "vocab.txt"} --image-size 16 --patch-size 8 --width 32
            --layers 2 --heads 2 --text-width 32 --text-layers 1 --text-heads 2 --embed-dim 16 --queue-size 64
            --epochs 2 --warmup 2 --eval-every 0""",
    }
    common = "--precision fp32 --log-every 1 --save-every 2 --workers 0".split()
    where = {name: ["--data", str(data), "--batch-size", "32"] for name in arms}
    where["nmtune-labels"] = ["--data", str(image_folder(parts / "classes", data)), "--batch-size", "8"]
    return {name: [*arms[name].split(), *common, *where[name]] for name in arms}


def image_folder(folder: Path, data: Path) -> Path:
    """Write image folders of two classes with twelve pictures each."""
    pairs = open_pairs(str(data))
    for row in range(24):
        path = folder / f"class{row % 2}/{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs.read(row).image.resize((16, 16)).save(path)
    return folder


def features(path: Path) -> Path:
    """Write features of three classes."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    np.savez(path, features=rng.standard_normal((60, 8)) + labels[:, None], labels=labels)
    return path


def yfcc15m(folder: Path, data: Path) -> Path:
    """Write SLIP's yfcc15m.pkl and zips with the 24 pairs that it names."""
    pairs, rows = open_pairs(str(data)), []
    for row in range(24):
        number, image = 12_345_990 + row, io.BytesIO()
        path = folder / f"images/12/{number // 1000 % 1000:03}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs.read(row).image.save(image, "JPEG")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{number % 1000:03}.jpg", image.getvalue())
        rows.append((number, pairs.caption(row), "a picture\nof it"))
    (folder / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))
    return folder


def stages(data: Path, parts: Path) -> dict[str, list[str]]:
    """Arguments, without --out, of the scripts before and after training; each takes a second or two.

    `parts` is the folder that `commands` filled.
    """
    (parts / "source").mkdir()
    (parts / "source/manifest.json").write_text('{"version": "test"}')
    (parts / "source/train").symlink_to(data)
    (parts / "names.txt").write_text("cat\nred heart\nface\n")
    for kind in ("short", "long"):
        entries = [{"__key__": key, "caption": f"a {kind} one"} for key in open_pairs(str(data), 8).keys.tolist()]
        (parts / f"{kind}.json").write_text(json.dumps(entries))
    tune = "--epochs 2 --log-every 1 --save-every 2 --workers 0 --precision fp32"
    pipeline = "--spacy en_core_web_sm --query-spacy en_core_web_sm --workers 1"
    yfcc = yfcc15m(parts / "yfcc", data)
    arguments = {
        "attentive_mask_clip.pack_yfcc": f"{yfcc}/yfcc15m.pkl --root {yfcc} --shard-size 10 --workers 1",
        "nmtune.train": f"--features {features(parts / 'features.npz')} --batch-size 12 {tune}",
        "nmtune.finetune": f"""full --encoder timm:resnet_emoji --data {image_folder(parts / "images", data)} {tune}
            --batch-size 8""",
        "protoclip.teacher": f"roberta-large --data {data} --model {parts / 'lm'} --dim 8",
        "studies.flame_recaption": f"--data {data}",
        "flame.embed": f"""small --data {data} --dataset-size 8 --llm {parts / "lm"} --precision fp32
            --short {parts / "short.json"} --long {parts / "long.json"}""",
        "tldr_reduction.reduce": f"{data} --select random --keep 0.5 --batch-size 50 --workers 0 --precision fp32",
        "concept_frequency.count": f"shards --data {data} --concepts {parts / 'names.txt'} {pipeline}",
    }
    return {module: text.split() for module, text in arguments.items()}


def offered(folder: str) -> dict[str, Any]:
    """{`SCRIPT PRESET`: configuration} of the presets of a folder's scripts; for recipes, the fields that they set."""
    found = {}
    for file in (ROOT / folder).glob("*.py"):
        for table in re.findall(r"preset_cli\((\w+)\)", file.read_text()):
            known = getattr(importlib.import_module(f"{folder}.{file.stem}"), table)
            found |= {f"{file.stem} {name}": config for name, (_, config) in known.items()}
    if folder == "tldr_reduction":
        recipes = importlib.import_module("tldr_reduction.config").RECIPES
        found |= {f"reduce --recipe {name}": recipe for name, (_, recipe) in recipes.items()}
    return found
