"""Steps and schedules against the authors' numbers; python -m tinyclip.train end to end on real emoji shards.

Every kind of stage, runs that do not go on. Kills and several processes: test_faults.py, test_scale.py.
Scripts start in forks of a server that has imported torch and the rest already.
"""

import copy
import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import tyro
from conftest import Case, Watch
from scripts import finished, metrics, one_sentence, same
from short_runs import small_set
from tinyclip_runs import MASKS, STEPS, TINY, arms, example, inheriting, preset, tiny

from shared import accumulate, checkpoints, run
from shared.corpus import open_corpus
from tests.adapters.tinyclip import clip_of, masks_of, pooling_widths
from tinyclip import config, train
from tinyclip.config import Config
from tinyclip.geometry import CONFIGS, convert_state_dict
from tinyclip.inheritance import initialise_student
from tinyclip.masks import L0Mask
from tinyclip.model import CLIP, Student, distillation_loss, load_clip

SCRIPT = "tinyclip.train"
PROCESS = run.Process(0, 1, torch.device("cpu"))


# ----------------------------------------------------------------------------------------- schedules, optimizers, steps


def stage(**settings) -> Config:
    return Config(precision="fp32", **settings)


def masked(clip: CLIP) -> Student:
    """A student with open masks."""
    return Student(clip, *[L0Mask.of(clip.geometry[tower]) for tower in ("vision", "text")])


def stepped(student, features, images, tokens, step, optimizers, cfg, parts=1):
    network = accumulate.micro_batches(student, parts)
    return train.train_step(network, features, images, tokens, step, optimizers, run.grad_scaler(cfg, PROCESS), cfg)


def stage_of(case: Case) -> tuple[Config, list]:
    lr, wd, beta1, beta2, eps, clip = case["hparams_lr_wd_b1_b2_eps_clip"].double().tolist()
    alpha, weight, warmup, total = case["hparams_alpha_weight_warmup_total"].tolist()
    scale = None if case["logit_scale_fixed"] < 0 else case["logit_scale_fixed"]
    cfg = stage(
        steps=int(total), lr=lr, warmup=int(warmup), weight_decay=wd, beta1=beta1, beta2=beta2, eps=eps, alpha=alpha,
        max_grad_norm=None if clip < 0 else clip, weight=weight, logit_scale=scale,
    )  # fmt: skip
    if "prune_step" in case:
        start, target, ramp = case["mask_start_target_warmup"].tolist()
        assert case["total_loss_flag"]  # one constraint over both towers, as in all scripts
        cfg.masks, cfg.prune_step = True, case["prune_step"]
        cfg.start_sparsity, cfg.target_sparsity, cfg.sparsity_warmup = start, target, int(ramp)
    return cfg, [(case[f"image/{i}"], case[f"text/{i}"]) for i in range(len(case["loss"]))]


def networks_of_run(init: dict, teacher: dict, cfg: Config, batches: list, loss: float) -> tuple[CLIP, CLIP]:
    """Student and teacher; ResNets get the pooling heads that reproduce the recorded first loss."""

    def make(state: dict, width: int) -> CLIP:
        return clip_of(state, **({"head_width": width} if "visual.conv3.weight" in state else {}))

    def error(widths: tuple[int, int]) -> float:
        student, answers = make(init, widths[0]).train(), make(teacher, widths[1]).eval()
        with torch.no_grad():
            features = train.teacher_forward(answers, *batches[0], cfg)
            output = student(*batches[0])
            return abs(distillation_loss(*output, *features, alpha=cfg.alpha, weight=cfg.weight).item() - loss)

    choices = list(itertools.product(pooling_widths(init), pooling_widths(teacher)))
    best = choices[0] if len(choices) == 1 else min(choices, key=error)
    return make(init, best[0]), make(teacher, best[1])


# log/5/*: after pruning ours has no masks; upstream still logs the values of those before
@pytest.mark.golden("tinyclip", "train_manual", "train_auto", unused=("log/5/*",))
def test_training_run(case, monkeypatch):
    """A whole stage, with the loss, gradient norm and mask parameters of every step."""
    cfg, batches = stage_of(case)
    init, teacher_state = convert_state_dict(case.group("init/")), convert_state_dict(case.group("teacher/"))
    names = dict(zip(init, case.group("init/"), strict=True))
    clip, teacher = networks_of_run(init, teacher_state, cfg, batches, case["loss"][0].item())
    student = Student(clip, *masks_of(init, clip) if cfg.masks else []).train()
    teacher.requires_grad_(False)
    optimizers, losses, norms, first = train.make_optimizers(student, cfg), [], [], {}
    clip_norm = torch.nn.utils.clip_grad_norm_

    def uniforms(student: Student) -> dict | None:
        towers = {"image": student.image_mask, "text": student.text_mask}
        return {
            tower: {kind: case[f"u/{step}/{tower}_{kind}"] for kind in mask.types}
            for tower, mask in towers.items()
            if mask is not None
        }

    def note(parameters, *arguments):
        if not first:  # gradients before clipping
            named = ((n.removeprefix("clip."), p.grad) for n, p in student.named_parameters())
            first.update({name: gradient.clone() for name, gradient in named if gradient is not None})
        return clip_norm(parameters, *arguments)

    monkeypatch.setattr(Student, "uniforms", uniforms)
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", note)
    for step, (images, tokens) in zip(range(cfg.steps), batches, strict=False):
        if student.masks and step == cfg.prune_step:
            student = student.pruned()
            optimizers = train.make_optimizers(student, cfg)
        for tower in ("image", "text"):
            mask = getattr(student, f"{tower}_mask")
            for name, value in (mask.state_dict() if mask is not None else {}).items():
                key = f"l0_before_step/{step}/_{tower}_encoder.l0_module.{name}"
                if key in case:
                    case.close(key, value, atol=1e-6)
        features = train.teacher_forward(teacher, images, tokens, cfg)
        logged = stepped(student, features, images, tokens, step, optimizers, cfg)
        losses.append(logged["loss"].item())
        norms.append(logged["gradient_norm"].item())
        for ours, theirs in (
            ("expected_sparsity", "all_expected_sparsity"), ("target_sparsity", "all_target_sparsity"),
            ("image_sparsity", "vision_expected_sparsity"), ("text_sparsity", "text_expected_sparsity"),
            ("constraint", "all_lagran_loss"),
        ):  # fmt: skip
            key = f"log/{step}/train/{theirs}"
            if key in case and ours in logged:
                case.close(key, logged[ours], atol=2e-5)
    case.close("loss", losses, atol=2e-5)
    case.close("grad_norm_before_clip", norms, rtol=1e-4)
    for name, value in first.items():
        if f"step0_grad/{names[name]}" in case:
            case.close(f"step0_grad/{names[name]}", value, atol=2e-5)
    expected = convert_state_dict(case.group("final/"))
    names, final = dict(zip(expected, case.group("final/"), strict=True)), student.clip.state_dict()
    assert final.keys() == expected.keys()
    for name, value in final.items():
        case.close(f"final/{names[name]}", value, atol=1e-4 if cfg.masks else 5e-5)


def test_steps_that_are_not_finite_are_skipped():
    student = Student(tiny().train())
    before = copy.deepcopy(student.state_dict())
    cfg = stage(steps=4, alpha=0.0, logit_scale=None)
    optimizers = train.make_optimizers(student, cfg)
    images, tokens = example()
    logged = stepped(student, None, images * math.inf, tokens, 0, optimizers, cfg)
    assert logged["skipped"] == 1 and all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    assert stepped(student, None, images, tokens, 0, optimizers, cfg)["skipped"] == 0


def test_the_scale_is_fixed_or_clamped():
    clip, found = tiny(), []
    for start, fixed in ((9.0, None), (-1.0, None), (9.0, 50.0)):
        clip.logit_scale.data.fill_(start)
        train.clamp_logit_scale(clip, fixed)
        found.append(clip.logit_scale.exp().item())
    assert found == pytest.approx([100, 1, 50])


def test_a_run_that_skips_all_its_steps_is_an_error():
    train.check_skipped(torch.tensor(3.0), 3, last=True)  # the fourth of four steps; the first was taken
    train.check_skipped(torch.tensor(4.0), 3, last=False)
    for skipped, step, last in ((4.0, 3, True), (101.0, 500, False)):
        with pytest.raises(ValueError, match="gradients were not finite"):
            train.check_skipped(torch.tensor(skipped), step, last)


def test_heads_of_another_width_are_not_sliced(tmp_path: Path):
    """Shapes alone would allow it, but a slice would mix heads."""
    torch.manual_seed(0)
    wide = CLIP(**{**CONFIGS["test-100"], "vision": {**CONFIGS["test-100"]["vision"], "head_width": 16}})
    torch.save({"state_dict": wide.state_dict(), "geometry": wide.geometry}, tmp_path / "wide.pt")
    cfg = config.Config(model="test-50", init=str(tmp_path / "wide.pt"), masks=False)
    with pytest.raises(ValueError, match="16 wide.* 8"):
        initialise_student(cfg)


def test_micro_batches_share_one_draw_of_masks():
    """So they give the gradients of one batch, including those of the constraint's multipliers."""
    found, images, tokens = [], *example(6)
    for parts in (1, 3):
        student = masked(tiny()).train()
        for mask in student.masks:
            for loga in mask.logas().values():
                loga.data.fill_(0.5)  # about half of the draws cut something
        cfg = stage(steps=9, alpha=0.5, logit_scale=None, masks=True, prune_step=5, accumulate=parts)
        features = train.teacher_forward(tiny(seed=1), images, tokens, cfg)
        torch.manual_seed(3)
        logged = stepped(student, features, images, tokens, 2, train.make_optimizers(student, cfg), cfg, parts)
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append((gradients, logged["loss"], logged["constraint"]))
    assert "image_mask.lambda_1" in found[0][0] and "text_mask.heads_loga" in found[0][0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("finite", [True, False])
def test_a_gpus_optimizers_skip_by_themselves(watch: Watch, finite: bool):
    """Weights equal bit for bit those of an optimizer that is told whether to step; masks are equal up to rounding."""
    made = []
    for asked in (True, False):
        student = masked(tiny()).train()
        make = train.make_optimizers if asked else watch.within(train.make_optimizers)
        optimizers = make(student, stage(masks=True))
        for i, use in enumerate((True, finite, True)):
            generator = torch.Generator().manual_seed(i)
            for parameter in student.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for optimizer in optimizers:
                step = train.step_if if asked else watch.within(train.step_if)
                step(torch.tensor(use), optimizer)
        made.append((student, optimizers))
    (asked, _), (own, optimizers) = made
    assert same(asked.clip.state_dict(), own.clip.state_dict())
    for name, value in asked.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=name)
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    assert {state["step"].item() for state in states} == {2.0 + finite}


def test_a_masked_step_does_not_wait(watch: Watch):
    """Neither the step with masks nor the teacher waits; its result equals the usual step up to rounding."""
    images, tokens = example()
    cfg = stage(masks=True, steps=9, prune_step=8, sparsity_warmup=1, target_sparsity=0.5, logit_scale=None)
    ends = []
    for within in (lambda function: function, watch.within):
        student = masked(tiny()).train()
        for mask in student.masks:
            for loga in mask.logas().values():
                loga.data = torch.randn(loga.shape, generator=torch.Generator().manual_seed(1))
        teacher, optimizers = tiny(1), within(train.make_optimizers)(student, cfg)
        teacher.cuts_padding = False
        for step in range(3):
            torch.manual_seed(step)
            features = within(train.teacher_forward)(teacher, images, tokens, cfg)
            logged = within(stepped)(student, features, images, tokens, step, optimizers, cfg)
        ends.append((student.state_dict(), logged))
    assert not any(x["skipped"] for _, x in ends)
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert ends[1][1]["loss"].item() == pytest.approx(ends[0][1]["loss"].item(), rel=1e-4)


# -------------------------------------------------------------------------------------------------- images and captions


def test_features_that_are_computed_once_are_those_of_each_step(embedded_corpus: None, tmp_path: Path):
    words = [*preset("emoji"), *TINY, "--out", str(tmp_path), "--init", "None"]
    cfg = tyro.extras.overridable_config_cli(config.PRESETS, args=words)
    teacher = initialise_student(cfg).clip.eval().requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    text = lambda pair: tokenizer(pair.caption)[0]  # noqa: E731
    corpus, view = open_corpus(cfg, PROCESS, text, cut_padding=True, side=16), train.training_view(cfg, 16)
    known, seen = train.teacher_features(teacher, corpus, view, cfg), 0
    for rows, images, tokens in corpus.epoch(1, view):
        found = train.teacher_forward(teacher, images, tokens, cfg)
        torch.testing.assert_close(known.image[rows], found.image, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(known.text[rows], found.text, rtol=1e-5, atol=1e-6)
        seen += len(rows)
    assert seen == len(corpus) == len(known.image) and known.scale == found.scale


# ----------------------------------------------------------------------------------------------------------- end to end


AUTO = config.PRESETS["emoji-auto"][1]


@pytest.fixture(scope="module")
def runs(cli, folder: Path) -> dict[str, Path]:
    for command in arms(folder).values():
        finished(cli(*command))
    return {arm: folder / f"{arm}-seed0" for arm in arms(folder)}


def test_every_stage_trains(runs: dict[str, Path]):
    for arm, out in runs.items():
        files = {".lock", "config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt", "model.pt"}
        files |= {"masks.pt"} if "auto" in arm else set()
        assert {path.name for path in out.iterdir()} == files, arm
        lines = [line for line in metrics(out) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert all(np.isfinite(value) for line in lines for value in line.values())
        assert [("constraint" in line) for line in lines] == ["auto" in arm] * 4 + [False] * 4
        state = checkpoints.load_checkpoint(out / "checkpoint.pt")
        assert state["step"] == STEPS and state["masks"] is None
        scale = state["state_dict"]["logit_scale"].exp().item()
        learned = arm in ("teacher", "convnet-teacher", "random-contrastive")
        assert math.isclose(scale, 50, rel_tol=1e-5) != learned


def test_sizes(runs: dict[str, Path]):
    sizes = {arm: load_clip(out) for arm, out in runs.items()}
    shapes = {arm: {name: value.shape for name, value in model.state_dict().items()} for arm, model in sizes.items()}
    assert shapes["random-channels"] == shapes["inherited-affinity"] == shapes["random-contrastive"]
    pruned, again = (
        sum(p.numel() for p in sizes[arm].transformer.parameters()) for arm in ("auto", "auto-progressive")
    )
    assert again < pruned < sum(p.numel() for p in sizes["teacher"].transformer.parameters())
    for arm in ("auto", "auto-progressive"):
        reached = [line["sparsity_reached"] for line in metrics(runs[arm]) if "sparsity_reached" in line]
        assert len(reached) == 1 and 0 < reached[0] < 1


def test_inherited_weights_start_as_the_teachers(runs: dict[str, Path]):
    cfg = dataclasses.replace(config.EMOJI, model="test-50", init=str(runs["teacher"]), image_size=16)
    student, teacher = initialise_student(cfg).clip, load_clip(runs["teacher"])
    assert torch.equal(student.visual.conv1.weight, teacher.visual.conv1.weight[:24])
    assert torch.equal(student.transformer.resblocks[0].ln_1.weight, teacher.transformer.resblocks[0].ln_1.weight)
    assert student.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    auto = dataclasses.replace(AUTO, model="test-100", init=str(runs["teacher"]), image_size=16)
    whole = initialise_student(auto)
    state, masks = whole.clip.state_dict(), whole.masks
    assert all(torch.equal(state[k], v) for k, v in teacher.state_dict().items() if k != "logit_scale")
    assert all((loga == 10).all() for mask in masks for loga in mask.logas().values())


def test_one_tower_alone_is_inherited(runs: dict[str, Path]):
    """The other tower starts like without --init."""
    cfg = dataclasses.replace(
        config.PRESETS["emoji-convnet"][1], model="test-convnet-50", init=str(runs["convnet-teacher"]), image_size=16
    )

    def start(**changes) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return initialise_student(dataclasses.replace(cfg, **changes)).clip.state_dict()

    random_weights, inherited, image, text = (
        start(**changes) for changes in ({"init": None}, {}, {"inherit_only": "image"}, {"inherit_only": "text"})
    )
    stem = load_clip(runs["convnet-teacher"]).visual.trunk.features[0].weight
    assert torch.equal(inherited["visual.trunk.features.0.weight"], stem[:12])
    for name, value in inherited.items():
        of_image = name.startswith("visual.")
        assert torch.equal(image[name], value if of_image else random_weights[name]), name
        assert torch.equal(text[name], random_weights[name] if of_image else value), name


def test_the_second_stage_starts_where_the_first_ended(runs: dict[str, Path]):
    """The weights left by the first stage are in the front corner of the full size, with open gates."""
    auto = dataclasses.replace(AUTO, model="test-100", init=str(runs["auto"]), image_size=16)
    found, first = initialise_student(auto), load_clip(runs["auto"])
    student, (image_mask, text_mask) = found.clip, found.masks
    width = first.geometry["text"]["width"]
    assert torch.equal(student.token_embedding.weight[:, :width], first.token_embedding.weight)
    assert not student.token_embedding.weight[:, width:].any()
    assert (text_mask.hidden_loga > 0).sum() == width
    heads = [int((row > 0).sum()) for row in image_mask.heads_loga]
    assert heads == [0 if block.attn is None else block.attn.heads for block in first.visual.transformer.resblocks]


def test_evaluation_during_training(runs: dict[str, Path], cli, folder: Path):
    ood = small_set("groups_ood", folder / "sets", every=40)
    options = [*TINY, *MASKS, "--steps", "6", "--eval-every", "3", "--eval-set", ood]
    given = ["--teacher", runs["teacher"], "--init", runs["teacher"]]
    finished(cli(*preset("emoji-auto"), *given, *options, "--out", folder / "evaluated"))
    points = [
        (line["step"], line["zero_shot_top1"]) for line in metrics(folder / "evaluated") if "zero_shot_top1" in line
    ]
    assert [step for step, _ in points] == [3, 6] and all(0 <= top1 <= 100 for _, top1 in points)


# at the step that cuts the masks next, and at the last
@pytest.mark.parametrize(("fails", "then"), [(4, "--eval-every 4"), (STEPS, "--eval-every 0")])
def test_a_failed_evaluation_costs_no_step(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, then: str
):
    """The resumed run repeats the evaluation alone, or none with --eval-every 0, and ends like an uninterrupted one."""
    scores, taken, broken, real = {4: 3.0, STEPS: 2.0}, [], [fails], train.train_step

    def quick_top1(*_) -> float:
        if (step := taken[-1] + 1) in broken:
            broken.remove(step)
            raise ValueError("broken set")
        return scores[step]

    monkeypatch.setattr(train, "quick_top1", quick_top1)
    monkeypatch.setattr(train, "train_step", lambda *given: taken.append(given[4]) or real(*given))
    given = [*preset("emoji-auto"), *inheriting(runs["teacher"]), *MASKS, *TINY, "--out", tmp_path / "run"]
    given = [str(word) for word in (*given, "--eval-set", "data/emoji/eval/groups_ood")]
    with pytest.raises(ValueError, match="broken set"):
        train.main(tyro.extras.overridable_config_cli(config.PRESETS, args=[*given, "--eval-every", "4"]))
    assert not (tmp_path / "run/model.pt").exists()
    train.main(tyro.extras.overridable_config_cli(config.PRESETS, args=[*given, *then.split()]))
    assert taken == list(range(STEPS))
    lines = metrics(tmp_path / "run")
    points = {line["step"]: line["zero_shot_top1"] for line in lines if "zero_shot_top1" in line}
    assert points == (scores if then.endswith("4") else {step: top1 for step, top1 in scores.items() if step < fails})
    assert [line for line in lines if "zero_shot_top1" not in line] == metrics(runs["auto"])
    for name in ("model.pt", "checkpoint.pt"):
        one, two = (checkpoints.load_checkpoint(out / name) for out in (tmp_path / "run", runs["auto"]))
        assert one.keys() == two.keys() and same(one["state_dict"], two["state_dict"]), name


# ----------------------------------------------------------------------------------------------- runs that do not go on


def test_runs_that_do_not_fit_are_refused(in_process, runs: dict[str, Path], tmp_path: Path):
    given = inheriting(runs["teacher"])
    result = in_process(*preset("emoji"), *given, *TINY, "--lr", "1e-4", "--out", runs["inherited-affinity"])
    assert result.code == 2 and "lr (was 0.002, now 0.0001)" in result.err and one_sentence(result.err)
    (tmp_path / "unfinished").mkdir()
    for message in ("folder without weights", "not finished"):
        command = *preset("emoji-contrastive"), *TINY, "--init", tmp_path / "unfinished", "--out", tmp_path / "a"
        result = in_process(*command)
        assert result.code == 2 and message in result.err and one_sentence(result.err)
        torch.save({"paper": "tinyclip"}, tmp_path / "unfinished/checkpoint.pt")
    result = in_process(
        *preset("emoji"), "--teacher", runs["teacher"], *TINY, "--model", "test-100", "--init", runs["auto"]
    )
    assert result.code == 2 and "more than" in result.err and one_sentence(result.err)
    assert "--init " in result.err


def test_a_teacher_of_another_image_size(in_process, runs: dict[str, Path], tmp_path: Path):
    """The teacher has 16 pixels and the student 24, so position embeddings are resized."""
    given = [*inheriting(runs["teacher"]), *TINY, "--image-size", "24"]
    result = in_process(*preset("emoji"), *given, "--out", tmp_path / "a")
    assert result.code == 0, result.err
    assert "16 pixels and 24 tokens" in result.out


@pytest.mark.usefixtures("embedded_corpus")
def test_a_run_does_not_go_on_with_another_teacher(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor does a new run keep the model.pt of an earlier one, whose checkpoint was removed."""
    teacher, out = tmp_path / "teacher.pt", tmp_path / "run"

    def write_teacher(seed: int) -> None:
        torch.manual_seed(seed)
        model = CLIP(**CONFIGS["test-25"])
        torch.save({"state_dict": model.state_dict(), "geometry": model.geometry}, teacher)

    write_teacher(0)
    options = [*preset("emoji"), *TINY, "--teacher", teacher, "--init", "None", "--steps", "2", "--out", out]
    assert in_process(*options).code == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(state | {"step": 1}, out / "checkpoint.pt")  # as if it had stopped early
    write_teacher(1)
    result = in_process(*options)
    assert result.code == 2 and "another teacher" in result.err
    (out / "checkpoint.pt").unlink()
    assert (out / "model.pt").exists()
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *_: sys.exit(7))  # stops before the new model.pt
    assert in_process(*options).code == 7 and not (out / "model.pt").exists()
