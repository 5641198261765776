"""ProtoCLIP's small model and training runs, for its tests."""

import dataclasses
from pathlib import Path

import pytest
from scripts import ROOT, SHARDS
from short_runs import small_set

from protoclip import config, train
from protoclip import eval as evaluation
from protoclip.model import ProtoCLIP


def tiny_model(embed_dim: int = 8, hidden_dim: int = 12, projection_dim: int = 6, num_layers: int = 1) -> ProtoCLIP:
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    sizes = {"hidden_dim": hidden_dim, "projection_dim": projection_dim, "num_layers": num_layers}
    return ProtoCLIP(embed_dim, vision, text, **sizes)


TEACHER = ROOT / "data/emoji/teacher.npz"
TINY = f"""--data {SHARDS}/00000.tar --external-teacher {TEACHER} --image-size 16 --episodes 3 --episode-size 160
    --batch-size 32 --k 8 --niter 5 --nredo 1 --hidden-dim 32 --projection-dim 16 --eval-every 0 --warmup 2
    --lr 1e-3 --precision fp32 --log-every 1 --max-grad-norm 50 --model ViT-test --no-keep-in-memory
    --no-distinct-captions --augmentation default""".split()


@pytest.fixture(scope="module", autouse=True)
def corpus(embedded_corpus: None):
    if not TEACHER.is_file():
        pytest.fail(f"{TEACHER} is missing: `python -m protoclip.teacher minilm` makes it", pytrace=False)


EMOJI = ROOT / "data/emoji"


def trained(folder: Path, preset: str, seed: int, **more) -> str:
    cfg = dataclasses.replace(
        config.PRESETS[preset][1],
        data=str(EMOJI / "train/00000.tar"),
        external_teacher=str(EMOJI / "teacher.npz"),
        eval_set=small_set("groups_id", folder.with_name(f"{folder.name}-sets"), every=40),
        out=str(folder),
        image_size=16,
        episodes=2,
        episode_size=128,
        batch_size=64,
        k=8,
        hidden_dim=32,
        projection_dim=16,
        warmup=2,
        eval_every=1,
        seed=seed,
        **more,
    )
    return str(train.main(cfg))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("eval")
    arms = {"clip": "emoji-clip", "protoclip": "emoji"}
    return [trained(folder / f"{arm}-seed{seed}", preset, seed) for arm, preset in arms.items() for seed in (0, 1)]


@pytest.fixture
def cfg(runs: list[str], tmp_path: Path) -> evaluation.Config:
    sets = tuple(small_set(name, tmp_path / "sets", every=24) for name in ("groups_id", "retrieval_xm_en"))
    return evaluation.Config(runs=tuple(runs), sets=sets, probe=sets[:1], gap=sets[1], device="cpu")
