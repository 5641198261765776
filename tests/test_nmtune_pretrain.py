"""Pre-training on noisy labels and captions, and what its encoders are for."""

import dataclasses
import re
import tarfile
from pathlib import Path

import pytest
import torch
from nmtune_runs import assert_equal_runs, corpus, images, in_process, start, two  # noqa: F401
from scripts import SHARDS, metrics
from short_runs import small_set

from nmtune import config, encoders, pretrain
from shared import accumulate, checkpoints, data
from shared.clip import set_grad_checkpointing

SCRIPT = "nmtune.train"

TINY_ENCODER = ["--model", "resnet_emoji", "--precision", "fp32", "--workers", "0", "--log-every", "1"]
SUPERVISED = ["small-sup", "--noise", "0.3", *TINY_ENCODER, "--no-keep-in-memory", "--epochs", "2", "--warmup", "2"]
CLIP = "small-clip --noise 0.3 --model ViT-test --no-keep-in-memory --precision fp32 --log-every 1 --warmup 2".split()
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


def test_pretraining_on_labels_and_fine_tuning(in_process, tmp_path, images):
    command = [*SUPERVISED, "--data", images, "--batch-size", "16", "--save-every", "2", "--out"]
    code, out, err = in_process("nmtune.pretrain", *command, tmp_path / "whole")
    assert code == 0 and re.search(r"0\.3: 31\.25 % of 48 labels", out), err
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


def test_positional_embeddings_decay_as_in_open_clip():
    """Positional embeddings have weight decay; gains, biases and the logit scale do not; timm's models keep timm's
    rule."""
    network = encoders.create_model(dataclasses.replace(config.SMALL_CLIP, model="ViT-emoji"))[0]
    optimizer = pretrain.make_optimizer(network, config.SMALL_CLIP)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in network.named_parameters()}
    assert found["positional_embedding"] == found["visual.positional_embedding"] == config.SMALL_CLIP.weight_decay
    assert found["logit_scale"] == found["ln_final.weight"] == found["visual.class_embedding"] == 0
    network = encoders.create_model(config.SMALL_SUPERVISED, 5)[0]
    groups = pretrain.make_optimizer(network, config.SMALL_SUPERVISED).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_pretraining_on_captions_and_lora(in_process, tmp_path, pairs, images):
    pytest.importorskip("peft")
    code, out, err = in_process("nmtune.pretrain", *CLIP, "--data", pairs, "--out", tmp_path / "clip")
    assert code == 0 and re.search(r"0\.3: [\d.]+ % of 80 captions", out), err
    options = ["--data", images, "--tests", f"again={images}", "--epochs", "1", "--batch-size", "16"]
    code, out, err = in_process(
        "nmtune.finetune", "lora", "--encoder", tmp_path / "clip", *options, "--workers", "0", "--log-every", "1",
        "--out", tmp_path / "lora",
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
    assert code == 2 and "text tower" in err


def test_swapped_captions_are_those_of_other_pairs(pairs):
    cfg = dataclasses.replace(config.SMALL_CLIP, data=str(pairs), noise=0.5, model="ViT-emoji")
    opened = data.open_pairs(str(pairs))
    samples = pretrain.SwappedCaptions(cfg, opened)
    for row, source in enumerate(samples.source):
        sample = samples.read(row)
        assert sample.target == opened.caption(int(source)) and sample.noisy == (row != source)
        assert sample.key == opened.keys[row]
    assert 0 < samples.noisy.mean() < 0.5


@pytest.mark.parametrize("kind, name", [("clip", "ViT-emoji"), ("supervised", "convnext_atto")])
def test_micro_batches_and_checkpointing_give_the_gradients_of_one_batch(kind: str, name: str):
    torch.manual_seed(0)
    images, tokens = torch.randn(8, 3, 40, 40), torch.randint(1, 49405, (8, 24))
    targets = tokens.scatter(1, torch.randint(2, 24, (8, 1)), 49407) if kind == "clip" else torch.arange(8) % 5
    found = []
    for parts, on in ((1, False), (4, True)):
        cfg = config.PretrainConfig(kind=kind, model=name, accumulate=parts, grad_checkpointing=on, precision="fp32")
        torch.manual_seed(1)
        network = pretrain.create_model(cfg, 5)[0].train()
        set_grad_checkpointing(network, on)
        optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.0), torch.amp.GradScaler("cpu", enabled=False)
        batch = images, targets, torch.zeros(8, dtype=torch.bool)
        wrapped = accumulate.micro_batches(network, parts)
        losses = pretrain.train_step(wrapped, batch, optimizer, scaler, 0.0, cfg)
        found.append((losses["loss"].detach(), [p.grad for p in network.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
