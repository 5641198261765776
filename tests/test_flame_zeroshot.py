"""Zero-shot classification: classifiers from templates, and features of images."""

import pytest
import torch
from test_flame_model import small

from flame import zeroshot
from flame.zeroshot import zero_shot_classifier


@pytest.mark.golden("flame", "zeroshot_classifier")
def test_zero_shot_classifier(case):
    classifier = zero_shot_classifier(case["template_embeds"])
    case.close("classifier", classifier, atol=1e-6)
    case.close("logits", 100 * case["image_features"] @ classifier, rtol=1e-5, atol=1e-4)
    metrics = zeroshot.zero_shot(case["image_features"], case["target"], classifier)
    case.close("top1", metrics["top1"] / 100, atol=1e-6)
    case.close("top5", metrics["top5"] / 100, atol=1e-6)


def test_images_are_encoded_in_eval_mode_and_training_goes_on():
    model, modes = small(16, 32).train(), []
    model.mm.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    batches = [(torch.zeros(2, 3, 32, 32), torch.tensor([1, 0])), (torch.zeros(1, 3, 32, 32), torch.tensor([2]))]
    features, labels = zeroshot.image_features(model, batches, "cpu", torch.float32)
    assert features.shape == (3, 16) and labels.tolist() == [1, 0, 2]
    assert modes == [False, False] and model.training
