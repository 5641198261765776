"""Zero-shot classification: classifiers from templates, and features of texts and images."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flame import config, zeroshot
from flame.model import FLAME, image_tower
from flame.zeroshot import zero_shot_classifier
from shared.zeroshot import classification_metrics


@pytest.mark.golden("flame", "zeroshot_classifier")
def test_zero_shot_classifier(case):
    classifier = zero_shot_classifier(case["template_embeds"])
    case.close("classifier", classifier, atol=1e-6)
    case.close("logits", 100 * case["image_features"] @ classifier, rtol=1e-5, atol=1e-4)
    metrics = classification_metrics(case["image_features"], case["target"], classifier)
    case.close("top1", metrics["top1"] / 100, atol=1e-6)
    case.close("top5", metrics["top5"] / 100, atol=1e-6)


@pytest.mark.parametrize("facet_ids, of_long", [((), 2), ((0, 1, 4), 0), ((0, 2), 2)], ids=["all", "summary", "two"])
def test_texts_are_centred_as_their_prompt(facet_ids: tuple[int, ...], of_long: int, monkeypatch):
    """Texts of the single prompt are centred with the first centre, of the long prompt with the last; runs on summary
    facets only have the single prompt."""
    features, asked = torch.tensor([[0.6, 0.0, 0.8]]), []

    def frozen(texts, multi):
        asked.append(multi)
        return features.expand(len(texts), 3)

    monkeypatch.setattr(zeroshot, "texts_of_bank", lambda bank, device, load: frozen)
    monkeypatch.setattr(zeroshot, "open_bank", lambda bank: SimpleNamespace(centres=0.5 * torch.eye(3)))
    model = FLAME(image_tower("emoji"), 128, 3, 16)
    for centre in (False, True):
        texts = zeroshot.text_features(model, config.Config(bank="bank", facet_ids=facet_ids, centre=centre))
        for multi, row in ((False, 0), (True, of_long)):
            expected = F.normalize(features - 0.5 * torch.eye(3)[row], dim=-1) if centre else features
            torch.testing.assert_close(texts(["a", "b"], multi), expected.expand(2, 3))
    assert asked == 2 * [False, of_long == 2]


def test_images_are_encoded_in_eval_mode_and_training_goes_on():
    model, modes = FLAME(image_tower("emoji"), 128, 16, 32).train(), []
    model.mm.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    batches = [(torch.zeros(2, 3, 32, 32), torch.tensor([1, 0])), (torch.zeros(1, 3, 32, 32), torch.tensor([2]))]
    features, labels = zeroshot.image_features(model, batches, "cpu", torch.float32)
    assert features.shape == (3, 16) and labels.tolist() == [1, 0, 2]
    assert modes == [False, False] and model.training
