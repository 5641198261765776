"""Pre-training on noisy labels and captions, in one and two processes, killed and resumed."""

import dataclasses
import io
import re
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import SHARDS, ended, finished, kill_at, metrics, same
from short_runs import small_set
from test_nmtune_train import (  # noqa: F401
    SCRIPT,
    SECONDS,
    assert_equal_runs,
    corpus,
    folder,
    images,
    in_process,
    start,
    two,
)
from torch.utils.data import Dataset

from nmtune import config, model, pretrain
from nmtune.datasets import open_labelled
from shared import checkpoints, data, run, windows
from shared.clip import set_grad_checkpointing

TINY_ENCODER = ["--model", "resnet_emoji", "--precision", "fp32", "--workers", "0", "--log-every", "1"]
SUPERVISED = ["emoji-sup-30", *TINY_ENCODER, "--no-keep-in-memory", "--epochs", "2", "--batch-size", "32"]
SUPERVISED += ["--warmup", "2"]
CLIP = "emoji-clip-30 --model ViT-test --no-keep-in-memory --precision fp32 --log-every 1 --warmup 2".split()
CLIP += ["--epochs", "2", "--batch-size", "32"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A shard of 80 real pairs."""
    path = tmp_path_factory.mktemp("pairs") / "0.tar"
    with tarfile.open(SHARDS / "00001.tar") as source, tarfile.open(path, "w") as target:
        members = sorted((m for m in source if m.name.endswith((".png", ".txt"))), key=lambda m: m.name)
        for member in members[:160]:
            target.addfile(member, source.extractfile(member))
    return path


def test_pretraining_on_labels_kill_and_resume(in_process, start, tmp_path, images):
    command = [*SUPERVISED, "--data", images, "--batch-size", "16", "--save-every", "2", "--out"]
    code, out, err = in_process("nmtune.pretrain", *command, tmp_path / "whole")
    assert code == 0 and re.search(r"noise ratio 0.3: 31.25 % of 48 labels wrong", out), err
    kill_at(start("nmtune.pretrain", *command, tmp_path / "killed"), tmp_path / "killed", 3)
    finished(ended(start("nmtune.pretrain", *command, tmp_path / "killed")))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    states = [checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("killed", "whole")]
    assert all(same(states[0][part], states[1][part]) for part in ("state_dict", "optimizer", "epoch", "noise"))
    # the encoder loads where it is wanted: in timm, in nmtune.train and in nmtune.finetune
    code, out, err = in_process(
        "nmtune.finetune", "full", "--encoder", tmp_path / "whole", "--data", images, "--tests", f"again={images}",
        "--epochs", "2", "--batch-size", "16", "--workers", "0", "--log-every", "1", "--out", tmp_path / "tuned",
    )  # fmt: skip
    assert code == 0 and "again/top1" in out, err
    assert {"ce", "cov", "svd"} <= set(metrics(tmp_path / "tuned")[0]) and "mse" not in metrics(tmp_path / "tuned")[0]
    state = checkpoints.load_checkpoint(tmp_path / "tuned/checkpoint.pt")["state_dict"]
    before = checkpoints.load_checkpoint(tmp_path / "whole/checkpoint.pt")["state_dict"]
    assert not torch.equal(state["image_encoder.stem.conv.weight"], before["stem.conv.weight"])


@pytest.mark.parametrize("kind", ["sup", "clip"])
def test_pretraining_in_memory_kill_and_resume(in_process, start, tmp_path, images, pairs, kind):
    data, name = (images, "resnet_emoji") if kind == "sup" else (pairs, "ResNet-test")
    command = [f"emoji-{kind}-30", "--model", name, "--data", data, "--precision", "fp32", "--epochs", "2"]
    command += [
        "--batch-size",
        "16",
        "--warmup",
        "2",
        "--log-every",
        "1",
        "--save-every",
        "2",
        "--keep-every",
        "4",
        "--out",
    ]
    code, _, err = in_process("nmtune.pretrain", *command, tmp_path / "whole")
    assert code == 0 and (tmp_path / "whole/checkpoint-4.pt").is_file(), err
    kill_at(start("nmtune.pretrain", *command, tmp_path / "killed"), tmp_path / "killed", 3)
    finished(ended(start("nmtune.pretrain", *command, tmp_path / "killed")))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    states = [checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("killed", "whole")]
    assert all(same(states[0][part], states[1][part]) for part in ("state_dict", "optimizer", "epoch", "noise"))


@pytest.mark.parametrize("kind", ["supervised", "clip"])
def test_batches_in_memory_equal_those_read_from_disk(images, pairs, kind):
    """Labels, captions and noise equal those read one by one, and broken images are counted; whole images equal the
    transform's, up to resizing decoded pixels."""
    base = config.EMOJI_SUPERVISED if kind == "supervised" else config.EMOJI_CLIP
    cfg = dataclasses.replace(base, data=str(images if kind == "supervised" else pairs), noise=0.3, batch_size=16)
    process, opened = run.Process(0, 1, torch.device("cpu")), []
    for kept in (False, True):
        labelled = open_labelled(cfg.data) if kind == "supervised" else None
        _, transform, side = model.create_model(cfg, 4)
        changed = dataclasses.replace(cfg, keep_in_memory=kept)
        opened.append(pretrain.open_samples(changed, transform, side, process, labelled))
    one_by_one, in_memory = opened
    pixels, targets, noisy = in_memory.decoded
    assert pixels.shape == (len(one_by_one), 3, 64, 64) and pixels.dtype == torch.uint8
    for row in range(len(one_by_one)):
        _, target, is_noise, _ = one_by_one[row]
        assert torch.equal(torch.as_tensor(target), targets[row]) and is_noise == noisy[row]
    epochs, found = range(0, 2), []
    for start_at in (0, 1):
        batches = pretrain.training_batches(
            in_memory, dataclasses.replace(cfg, keep_in_memory=True), process, epochs, start_at
        )
        found.append(list(batches))
    assert [len(batch[1]) for batch in found[0]][:3] == [16, 16, 16] and len(found[0]) == len(found[1]) + 1
    for (weight, views, labels, *_), (_, again, same_labels, *_) in zip(found[0][1:], found[1], strict=True):
        assert weight == 1 and views.shape[1:] == (3, 32, 32) and torch.equal(views, again)
        assert torch.equal(labels, same_labels)
    assert not torch.equal(found[0][0][1], found[0][len(found[0]) // 2][1])  # another epoch, other crops


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_batches_in_memory_are_pinned_for_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str):
    """Images and targets are pinned; the flags of noise, which stay on the CPU, are not."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    cfg = dataclasses.replace(config.EMOJI_SUPERVISED, batch_size=4, keep_in_memory=True)
    images, labels, pinned = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8), []
    inside = {"decoded": (images, labels, labels > 5), "side": 4, "__len__": lambda self: 8}
    samples = type("Samples", (), inside)()
    process = run.Process(0, 1, torch.device(kind))
    batches = list(pretrain.training_batches(samples, cfg, process, range(1), 0))
    copied = [x for _, images, targets, *_ in batches for x in (images, targets)]
    assert len(copied) == 4 and [id(x) for x in pinned] == [id(x) for x in copied if kind == "cuda"]


def test_positional_embeddings_decay_as_in_open_clip():
    """Positional embeddings have weight decay; gains, biases and the logit scale do not; timm's models keep timm's
    rule."""
    network = model.create_model(dataclasses.replace(config.EMOJI_CLIP, model="ViT-emoji"))[0]
    optimizer = pretrain.make_optimizer(network, config.EMOJI_CLIP)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in network.named_parameters()}
    assert found["positional_embedding"] == found["visual.positional_embedding"] == config.EMOJI_CLIP.weight_decay
    assert found["logit_scale"] == found["ln_final.weight"] == found["visual.class_embedding"] == 0
    network = model.create_model(config.EMOJI_SUPERVISED, 5)[0]
    groups = pretrain.make_optimizer(network, config.EMOJI_SUPERVISED).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_pretraining_on_captions_and_lora(in_process, tmp_path, pairs, images):
    pytest.importorskip("peft")
    code, out, err = in_process("nmtune.pretrain", *CLIP, "--data", pairs, "--out", tmp_path / "clip")
    assert code == 0 and re.search(r"noise ratio 0.3: [\d.]+ % of 80 captions displaced", out), err
    options = ["--data", images, "--tests", f"again={images}", "--epochs", "1", "--batch-size", "16"]
    code, out, err = in_process(
        "nmtune.finetune", "emoji-lora", "--encoder", tmp_path / "clip", *options, "--log-every", "1", "--out",
        tmp_path / "lora",
    )  # fmt: skip
    assert code == 0 and "again/top1" in out, err
    tuned, whole = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) of ([\d,]+) parameters", out).groups())
    assert tuned < 0.2 * whole
    state = checkpoints.load_checkpoint(tmp_path / "lora/checkpoint.pt")["state_dict"]
    assert any("lora_A" in key and "c_fc" in key for key in state)
    # zero-shot: measured, and where a linear probe starts
    sets = small_set("groups_ood", tmp_path / "sets", every=40)
    code, out, err = in_process("nmtune.eval", tmp_path / "clip", "--sets", sets, "--device", "cpu")
    assert (
        code == 0
        and "top1" in out
        and "groups_ood/top1" in checkpoints.read_json(tmp_path / "clip/results.json")["metrics"]
    )
    options = ["lp", "--encoder", tmp_path / "clip", "--data", images, "--tests", f"again={images}", "--workers", "0"]
    code, out, err = in_process(
        "nmtune.train", *options, "--zero-shot", "--epochs", "1", "--lr", "1e-12", "--out", tmp_path / "probe"
    )
    assert code == 0 and "again/top1" in out, err
    weights = checkpoints.load_checkpoint(tmp_path / "probe/checkpoint.pt")["head"]["weight"]
    scale = checkpoints.load_checkpoint(tmp_path / "clip/checkpoint.pt")["state_dict"]["logit_scale"].exp()
    torch.testing.assert_close(weights.norm(dim=1), scale.expand(len(weights)), rtol=1e-4, atol=1e-4)
    options[options.index(tmp_path / "clip")] = "timm:resnet_emoji"
    code, _, err = in_process("nmtune.train", *options, "--zero-shot", "--out", tmp_path / "none")
    assert code == 2 and "text tower, but timm:resnet_emoji has none" in err


def test_swapped_captions_are_those_of_other_pairs(pairs):
    cfg = dataclasses.replace(config.EMOJI_CLIP, data=str(pairs), noise=0.5, model="ViT-emoji")
    opened = data.open_pairs(str(pairs))
    samples = pretrain.SwappedCaptions(cfg, lambda image: torch.zeros(1), lambda texts: [texts[0]], opened)
    captions = [opened.caption(row) for row in range(len(samples))]
    for row, source in enumerate(samples.source):
        assert samples[row][1] == captions[source] == samples[row + len(samples)][1]  # in each epoch
        assert samples[row][2] == (row != source)
    assert 0 < samples.share() < 0.5


def test_within_windows_captions_are_swapped_shard_by_shard(pairs: Path, tmp_path: Path):
    """Swaps are the same in every epoch and for all window sizes; nearly a share gamma is swapped, and no caption is
    lost."""
    urls = [str(pairs)]
    for i in (1, 2):
        urls.append(str(tmp_path / f"{i}.tar"))
        with tarfile.open(pairs) as source, tarfile.open(urls[-1], "w") as target:
            for member in source:
                content = source.extractfile(member).read() if member.name.endswith("png") else f"{i} {member.name}"
                content, member.name = content if isinstance(content, bytes) else content.encode(), f"{i}-{member.name}"
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
    settings = {"data": "::".join(urls), "noise": 0.5, "window_shards": 2, "dataset_size": 240, "batch_size": 8}
    cfg = dataclasses.replace(config.EMOJI_CLIP, **settings, cache=str(tmp_path / "cache"), out=str(tmp_path / "run"))
    opened = windows.open_pairs(cfg, run.Process(0, 1, torch.device("cpu")))
    samples = pretrain.SwappedWithinShards(cfg, lambda image: torch.zeros(1), lambda texts: [texts[0]], opened)
    by_row = data.open_pairs(cfg.data)
    own = {by_row.keys[row]: by_row.caption(row) for row in range(len(by_row))}
    shard = {by_row.keys[row]: by_row.shard_of(row) for row in range(len(by_row))}
    home, seen = {caption: shard[key] for key, caption in own.items()}, ({}, {})
    for epoch in range(2):
        for i in range(epoch * 240, (epoch + 1) * 240):
            at, row, _ = samples.place(i)
            _, caption, noisy, _ = samples[i]
            seen[epoch][at.keys[row]] = caption
            assert noisy == (caption != own[at.keys[row]]) or list(own.values()).count(caption) > 1
    for key in seen[0].keys() & seen[1].keys():
        assert seen[0][key] == seen[1][key]
    others = [(key, caption) for key, caption in seen[0].items() if shard[key]]  # their captions say whose they are
    assert len(others) > 50 and all(home[caption] == shard[key] for key, caption in others)
    moved = [caption != own[key] for found in seen for key, caption in found.items()]
    assert 0.25 < sum(moved) / len(moved) < 0.5 and 0.25 < samples.share() < 0.5


def test_two_processes_equal_one_in_pretraining(in_process, two, tmp_path, pairs):
    command = [*CLIP, "--data", pairs, "--out"]
    assert in_process("nmtune.pretrain", *command, tmp_path / "one")[0] == 0
    two("nmtune.pretrain", *command, tmp_path / "two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two", "state_dict")


def test_three_processes_share_a_short_last_batch(in_process, two, tmp_path, images):
    """The last twelve of 48 images, in batches of 36, are shared among the processes instead of all going to the
    first."""
    command = ["emoji-sup-30", "--model", "test_convnext", "--precision", "fp32", "--workers", "0", "--log-every", "1"]
    command += ["--epochs", "1", "--batch-size", "36", "--warmup", "2", "--data", images, "--out"]
    assert in_process("nmtune.pretrain", *command, tmp_path / "one")[0] == 0
    two("nmtune.pretrain", *command, tmp_path / "more", count=3)
    a, b = (checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt")["state_dict"] for name in ("one", "more"))
    for name in a:
        apart = (a[name] - b[name]).abs() > 1e-4 * (1 + a[name].abs())
        assert apart.float().mean() <= 1e-3, f"{name}: {apart.sum()} of {apart.numel()} differ"


def test_shares_of_a_batch_add_up():
    cfg = dataclasses.replace(config.PRETRAIN_PRESETS["emoji-sup-30"][1], batch_size=6)
    ranks = [pretrain.batch_order(cfg, 14, 0, run.Process(rank, 3, torch.device("cpu")), 0) for rank in range(3)]
    one = pretrain.batch_order(cfg, 14, 0, run.Process(0, 1, torch.device("cpu")), 0)
    assert [len(rows) for rows in one[0]] == [6, 6, 2] and one[1] == [1.0] * 3
    for step in range(3):
        weighted = [(rows[step].tolist(), weights[step]) for rows, weights in ranks]
        assert sum(([*rows] for rows, weight in weighted if weight), []) == one[0][step].tolist()
        mean = sum(weight * sum(rows) / len(rows) for rows, weight in weighted) / 3
        assert mean == pytest.approx(one[0][step].mean())
    assert [weights[2] for _, weights in ranks] == [1.5, 1.5, 0.0]


class Rows(Dataset):
    """A data set whose items are their own numbers."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, i: int) -> tuple:
        return torch.tensor([int(i)]), 0, False, []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 2])
def test_weights_of_a_resumed_run_are_right_while_workers_read_ahead(rank: int, workers: int):
    """Loaders request the batches of several steps and of the next epoch in advance.

    The third rank has none of the last two rows, so its weight is 0 there.
    """
    cfg = dataclasses.replace(
        config.PRETRAIN_PRESETS["emoji-sup-30"][1], batch_size=6, workers=workers, keep_in_memory=False
    )
    process = run.Process(rank, 3, torch.device("cpu"))
    found = pretrain.training_batches(Rows(), cfg, process, range(1, 4), 2)
    found = [(weight, items.flatten().tolist()) for weight, items, *_ in found]
    expected = []
    for epoch, first in ((1, 2), (2, 0), (3, 0)):
        order, weights = pretrain.batch_order(cfg, 14, epoch, process, first)
        expected += [(weight, (14 * epoch + rows).tolist()) for rows, weight in zip(order, weights, strict=True)]
    assert found == expected and [weight for weight, _ in found[1:4]] == [1.0, 1.0, {0: 1.5, 2: 0.0}[rank]]


@pytest.mark.parametrize("kind, name", [("clip", "ViT-emoji"), ("supervised", "convnext_atto")])
def test_micro_batches_and_checkpointing_give_the_gradients_of_one_batch(kind: str, name: str):
    torch.manual_seed(0)
    images, tokens = torch.randn(8, 3, 40, 40), torch.randint(1, 49405, (8, 24))
    targets = tokens.scatter(1, torch.randint(2, 24, (8, 1)), 49407) if kind == "clip" else torch.arange(8) % 5
    found = []
    for parts, on in ((1, False), (4, True)):
        cfg = config.PretrainConfig(kind=kind, model=name, accumulate=parts, grad_checkpointing=on)
        torch.manual_seed(1)
        network = pretrain.create_model(cfg, 5)[0].train()
        set_grad_checkpointing(network, on)
        optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.0), torch.amp.GradScaler("cpu", enabled=False)
        batch, process = (images, targets, torch.zeros(8, dtype=torch.bool)), run.Process(0, 1, torch.device("cpu"))
        losses = pretrain.train_step(network, batch, optimizer, scaler, 0.0, cfg, process, "fp32")
        found.append((losses["loss"].detach(), [p.grad for p in network.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
