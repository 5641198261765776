"""Weights of the authors' files, transformers' BLIP and BERT; conversion of released files to run folders; exports."""

import pytest
import torch
from authors_files import beside_weights
from tldr_reduction_runs import tiny_blip, tiny_captioner

from tldr_reduction import checkpoints, config
from tldr_reduction.blip import TextTransformer, VisionTransformer, resize_pos_embed
from tldr_reduction.model import CodebookCaptioner
from tldr_reduction.tokenizer import WordPiece


def test_without_a_network_the_flag_of_the_weights_is_named(monkeypatch: pytest.MonkeyPatch):
    def fails(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(checkpoints.timm, "create_model", fails)
    with pytest.raises(ValueError, match="no network.*--vision-init None"):
        checkpoints.init_vision(VisionTransformer(32, 16, 8, 1, 1), "deit")
    monkeypatch.setattr("transformers.AutoModelForMaskedLM.from_pretrained", fails)
    with pytest.raises(ValueError, match="no network.*--text-init None"):
        checkpoints.init_text(tiny_captioner(), "bert")


def test_authors_layout_loads(tmp_path):
    """A file with the authors' keys, among them momentum copies, queues and position_ids; the model has another grid
    and no codebook."""
    torch.manual_seed(1)
    source = tiny_captioner()
    state = {name: torch.randn_like(value) for name, value in source.state_dict().items()}
    state["text_decoder.cls.predictions.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state["text_decoder.cls.predictions.decoder.bias"] = state["text_decoder.cls.predictions.bias"]
    extra = {"text_decoder.bert.embeddings.position_ids": torch.arange(24)[None], "queue_ptr": torch.zeros(1)}
    extra |= {f"visual_encoder_m.{n}": v for n, v in source.visual_encoder.state_dict().items()}
    torch.save(beside_weights(model=state | extra), tmp_path / "theirs.pth")
    target = CodebookCaptioner(
        VisionTransformer(24, 8, 16, 2, 4), TextTransformer(30, 16, 2, 4, 24, 16), None, sep_token_id=3
    )
    assert checkpoints.load_blip(target, tmp_path / "theirs.pth") == []
    loaded = target.state_dict()
    pos_embed = resize_pos_embed(state["visual_encoder.pos_embed"], 3)
    assert torch.equal(loaded["visual_encoder.pos_embed"], pos_embed)
    assert all(torch.equal(loaded[name], state[name]) for name in loaded if "pos_embed" not in name)
    assert checkpoints.load_blip(tiny_captioner(), tmp_path / "theirs.pth") == []
    with pytest.raises(ValueError, match="none of"):
        checkpoints.load_blip(target, {"model": {"conv1": torch.zeros(1)}})


def test_hugging_face_blip_agrees():
    """With the same weights, transformers' BLIP has the same matching logits and cosines."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text_config = sizes | dict(vocab_size=30, max_position_embeddings=24, encoder_hidden_size=16, projection_dim=8)
    vision_config = sizes | dict(image_size=16, patch_size=8, layer_norm_eps=1e-6)
    settings = transformers.BlipConfig(text_config=text_config, vision_config=vision_config, image_text_hidden_size=8)
    theirs = transformers.BlipForImageTextRetrieval(settings).eval()
    ours = tiny_blip().eval()
    ours.vision_proj, ours.text_proj = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
    missing = checkpoints.load_blip(ours, theirs.state_dict())
    assert all(
        name.startswith(("text_decoder", "image_queue", "text_queue", "queue_ptr", "temp")) or "_m." in name
        for name in missing
    ), missing
    image, ids = torch.randn(3, 3, 16, 16), torch.randint(4, 28, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=image, attention_mask=mask, use_itm_head=True)
        cosines = theirs(input_ids=ids, pixel_values=image, attention_mask=mask, use_itm_head=False)
        torch.testing.assert_close(ours.itm(image, ids, mask), expected.itm_score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.itc(image, ids, mask), cosines.itm_score, rtol=1e-4, atol=1e-5)


def test_a_released_file_becomes_a_run(tmp_path, capsys):
    """A file without decoder, as BLIP's for retrieval are, becomes a scorer; its sizes are read from the tensors."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(24))]) + "\n")
    torch.manual_seed(2)
    source = tiny_blip()
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("text_decoder")}
    torch.save(beside_weights(model=state, config={"image_size": 384, "vit": "base"}), tmp_path / "retrieval.pth")
    flags = dict(source=str(tmp_path / "retrieval.pth"), vocab=str(tmp_path / "vocab.txt"))
    checkpoints.main(checkpoints.Config(**flags, out=str(tmp_path / "scorer")))
    model, settings, _ = checkpoints.load_run(tmp_path / "scorer")
    assert settings.stage == "blip" and settings.image_size == 16 and f"{settings.width}" in capsys.readouterr().out
    kept = {name: value for name, value in model.state_dict().items() if name in state and "queue" not in name}
    assert all(torch.equal(value, state[name]) for name, value in kept.items()) and "itm_head.weight" in kept
    checkpoints.main(checkpoints.Config(**flags, out=str(tmp_path / "larger"), image_size=24))
    assert checkpoints.load_run(tmp_path / "larger")[0].visual_encoder.pos_embed.shape[1] == 10
    with pytest.raises(ValueError, match="--stage finetune"):
        checkpoints.main(checkpoints.Config(**flags, out=str(tmp_path / "writer"), stage="finetune"))
    source = checkpoints.Config(**flags, out=str(tmp_path / "again"))
    source.source = str(tmp_path / "scorer/checkpoint.pt")
    with pytest.raises(ValueError, match="run folder already"):
        checkpoints.main(source)
    with pytest.raises(ValueError, match="holds a run already"):
        checkpoints.main(checkpoints.Config(**flags, out=str(tmp_path / "scorer")))


def test_bert_starts_the_text_towers(tmp_path):
    """Encoder, decoder and LM head have BERT's weights; cross-attention, [DEC] and [ENC] are not changed."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=28, max_position_embeddings=24, **sizes))
    bert.save_pretrained(tmp_path)
    theirs, model = bert.state_dict(), tiny_blip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoints.init_text(model, str(tmp_path))
    for name, value in model.state_dict().items():
        if "crossattention" in name or not name.startswith(("text_encoder.", "text_decoder.")):
            assert torch.equal(value, before[name])
        else:
            tower, _, rest = name.partition(".")
            expected = theirs[("bert." if tower == "text_encoder" else "") + rest]
            assert torch.equal(value[: len(expected)], expected)
            assert torch.equal(value[len(expected) :], before[name][len(expected) :])
    with pytest.raises(ValueError, match="does not fit"):
        wider = TextTransformer(30, 32, 2, 4, 24, 16)
        checkpoints.init_text(CodebookCaptioner(VisionTransformer(16, 8, 16, 2, 4), wider, None), str(tmp_path))


def test_runs_are_exported_for_stock_blip_and_transformers(tmp_path, capsys):
    """blip.pth has all of BLIP's names under "model"; transformers' classes load the folders, with equal outputs."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", *map(str, range(22))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer, model = WordPiece(tmp_path / "vocab.txt"), tiny_blip().eval()
    sizes = dict(image_size=16, patch_size=8, width=16, layers=2, heads=4, text_width=16, text_layers=2, text_heads=4)
    sizes |= dict(max_positions=24, embed_dim=len(model.vision_proj.weight))
    checkpoints.export_blip(model, config.Config(**sizes), tokenizer, tmp_path / "out")
    assert "retrieval" in capsys.readouterr().out
    state = torch.load(tmp_path / "out/blip.pth", weights_only=True)["model"]
    assert {"itm_head.weight", "visual_encoder_m.pos_embed", "text_decoder.cls.predictions.decoder.bias"} <= set(state)
    assert checkpoints.load_blip(tiny_blip(), tmp_path / "out/blip.pth") == []
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/retrieval")
    assert loaded("cat").input_ids == [2, 5, 3] and loaded.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [28, 29]
    assert transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "out/captioning") is not None
    with pytest.raises(ValueError, match="run folder: name another"):
        (tmp_path / "out/checkpoint.pt").touch()
        checkpoints.export_blip(model, config.Config(**sizes), tokenizer, tmp_path / "out")
    sizes.pop("embed_dim")
    codes = tiny_captioner().eval()  # transformers' BLIP has no codebook
    checkpoints.export_blip(codes, config.CaptionerConfig(**sizes, code_dim=8), tokenizer, tmp_path / "codes")
    assert "nothing for transformers" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["blip.pth"]
