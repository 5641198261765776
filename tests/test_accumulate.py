"""Micro-batches give the gradients of the whole batch: in one and two processes, in several precisions, and in training
scripts."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from scripts import in_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from shared import accumulate, run

SCRIPT, SECONDS = "protoclip.train", 300


class Output(NamedTuple):
    image: Tensor
    text: Tensor | None
    scale: Tensor
    bias: Tensor


class Towers(nn.Module):
    """Two small towers; the temperature is returned as a function of its parameter, the bias as the parameter
    itself."""

    def __init__(self, dropout: float = 0.0, norm: bool = False, output: type = Output):
        super().__init__()
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.image = nn.Sequential(nn.Linear(6, 16), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))
        self.text = nn.Sequential(nn.Embedding(20, 16), nn.Dropout(dropout), nn.Linear(16, 4))
        self.logit_scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-1.0))
        self.output, self.calls = output, 0

    def forward(self, image: Tensor, text: Tensor, gain: float = 1.0):
        self.calls += 1
        features = F.normalize(gain * self.image(image), dim=-1), F.normalize(self.text(text).mean(1), dim=-1)
        values = dict(zip(Output._fields, (*features, self.logit_scale.exp(), self.bias), strict=True))
        return values if self.output is dict else self.output(**values)


def loss_of(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """InfoNCE and a sigmoid loss term of this process's rows against all columns, so that both parameters get
    gradients."""
    image, text = image.float(), text.float()
    logits = scale * image @ run.gather(text).T
    own = run.own_columns(image)
    positive = 2.0 * F.one_hot(own, logits.shape[1]) - 1
    back = F.cross_entropy(scale * text @ run.gather(image).T, own)
    return F.cross_entropy(logits, own) + back - F.logsigmoid(positive * (logits + bias)).mean()


def pairs(rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 20, (rows, 5), generator=generator)


def step(model: nn.Module, inputs: tuple, parts: int, precision: str = "fp32", scaler=None):
    """Gradients of a step and its loss; `model` may be wrapped already."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    network = model if isinstance(model, DistributedDataParallel) else accumulate.micro_batches(model, parts)
    bare = run.bare(network)
    bare.zero_grad()
    with run.autocast(precision, torch.device("cpu")):
        output = network(*inputs)
    loss = loss_of(**output) if isinstance(output, dict) else loss_of(*output)
    scaler.scale(loss).backward()
    scale = scaler.get_scale() if scaler.is_enabled() else 1.0
    gradients = {name: None if p.grad is None else p.grad / scale for name, p in bare.named_parameters()}
    return gradients, loss.detach()


def in_pieces(model: nn.Module, inputs: tuple[Tensor, Tensor], parts: int, precision: str = "fp32"):
    """Gradients of a step that embeds its micro-batches in sequence and keeps all their graphs."""
    outputs = []
    for batch in zip(*(x.chunk(parts) for x in inputs), strict=True):
        with run.autocast(precision, torch.device("cpu")):
            outputs.append(model(*batch))
    image, text = (torch.cat(features) for features in list(zip(*outputs, strict=True))[:2])
    loss = loss_of(image, text, *outputs[0][2:])
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.detach()


def close(ours, theirs, **tolerance) -> None:
    (gradients, loss), (expected, total) = ours, theirs
    torch.testing.assert_close(loss, total, **tolerance)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", [Output, dict])
@pytest.mark.parametrize("parts, rows", [(2, 12), (4, 12), (12, 12), (5, 7), (8, 3)])
def test_micro_batches_give_the_gradients_of_one_batch(kind: type, parts: int, rows: int):
    inputs = pairs(rows)
    close(step(Towers(output=kind), inputs, parts), step(Towers(), inputs, 1), rtol=1e-5, atol=1e-6)


def test_one_micro_batch_is_the_model_itself():
    model = Towers()
    assert accumulate.micro_batches(model, 1) is model
    assert run.bare(accumulate.micro_batches(model, 2)) is model


def test_random_numbers_and_batch_statistics_are_those_of_one_pass():
    """Dropout repeats in the second pass, batch statistics are updated once, and later random numbers are unchanged."""
    ours, theirs = Towers(0.4, norm=True), Towers(0.4, norm=True)
    found = []
    for model, function in ((ours, step), (theirs, in_pieces)):
        torch.manual_seed(5)
        found.append((function(model, pairs(), 3), torch.rand(4)))
    close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][1], found[1][1])
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert (ours.calls, theirs.calls) == (6, 3) and ours.image[1].num_batches_tracked == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("enabled", [False, True])
def test_precision_and_gradient_scaler(precision: str, enabled: bool):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    ours = step(Towers(), pairs(), 3, precision, scaler)
    close(ours, in_pieces(Towers(), pairs(), 3, precision), rtol=1e-2 if precision == "bf16" else 1e-5, atol=1e-5)


def test_inputs_that_are_no_tensors_go_to_every_micro_batch():
    inputs = *pairs(), -1.0
    close(step(Towers(), inputs, 4), step(Towers(), inputs, 1), rtol=1e-5, atol=1e-6)
    assert not torch.equal(step(Towers(), inputs, 4)[1], step(Towers(), pairs(), 4)[1])


def test_a_frozen_tower_and_an_output_that_is_a_tensor():
    gradients = []
    for parts in (1, 3):
        model = Towers()
        model.text.requires_grad_(False)
        close(step(model, pairs(), parts), step(model, pairs(), 1), rtol=1e-5, atol=1e-6)
        assert model.text[0].weight.grad is None
        accumulate.micro_batches(model.image, parts)(pairs()[0]).square().sum().backward()
        gradients.append(model.image[0].weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_statistics_are_frozen_only_in_training_and_only_inside():
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    expected = norm(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with contextlib.suppress(KeyError), accumulate.frozen_statistics(nn.Sequential(norm, untracked)):
        assert torch.equal(norm(x), expected)
        raise KeyError
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items()) and norm.momentum == 0.1
    norm(x)
    assert norm.num_batches_tracked == 2 and not torch.equal(before["running_mean"], norm.running_mean)


# ------------------------------------------------------------------------------------------------------ two processes


def two_steps_of_rank(rank: int) -> tuple:
    """Gradients and loss of the second step of a rank with three micro-batches, and the number of all-reduces."""
    model, sent = DistributedDataParallel(accumulate.micro_batches(Towers(), 3)), []
    model.register_comm_hook(sent, lambda sent, bucket: sent.append(1) or default_hooks.allreduce_hook(None, bucket))
    inputs = tuple(x.chunk(2)[rank] for x in pairs())
    for _ in range(2):
        found = step(model, inputs, 3)
    return found, len(sent)


def test_two_processes_equal_one_batch_and_share_gradients_once_a_step(tmp_path: Path):
    (one, sent), (two, _) = in_ranks(two_steps_of_rank, 2, tmp_path)
    mean = (one[0], (one[1] + two[1]) / 2)
    close(mean, step(Towers(), pairs(), 1), rtol=1e-5, atol=1e-6)
    close((two[0], mean[1]), mean, rtol=0, atol=0)
    assert sent == 2
