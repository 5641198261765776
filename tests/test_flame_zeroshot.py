"""Zero-shot classification: classifiers from templates, and features of images."""

import torch
from flame_runs import small

from flame import zeroshot


def test_images_are_encoded_in_eval_mode_and_training_goes_on():
    model, modes = small(16, 32).train(), []
    model.mm.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    batches = [(torch.zeros(2, 3, 32, 32), torch.tensor([1, 0])), (torch.zeros(1, 3, 32, 32), torch.tensor([2]))]
    features, labels = zeroshot.image_features(model, batches, "cpu", torch.float32)
    assert features.shape == (3, 16) and labels.tolist() == [1, 0, 2]
    assert modes == [False, False] and model.training
