"""Words of patches, and few-shot classification in the context of an LLM."""

import pytest
import torch
from test_flame_model import Letters

from flame.incontext import episodes, few_shot, nearest_tokens, pool_patches
from flame.model import FLAME, image_tower


@pytest.mark.golden("flame", "patch_pool")
def test_patch_pool(case):
    tokens = case["patch_tokens"]
    case.close("pooled_49", pool_patches(tokens, 2), atol=1e-6)
    case.close("pooled_16", pool_patches(tokens, 4, 1), atol=1e-6)


def test_words_of_patches_and_few_shot():
    model, head = FLAME(image_tower("emoji"), 128, 16, 32).eval(), torch.nn.Linear(16, 258, bias=False)
    ids = nearest_tokens(model, head, torch.randn(2, 3, 32, 32), kernel=4)
    assert ids.shape == (2, 1) and ids.max() < 258

    class Echo(torch.nn.Module):
        """A model that predicts what followed the last occurrence of the previous two letters."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache):
            text, logits = "".join(chr(i - 2) for i in input_ids[0].tolist() if i > 1), torch.zeros(1, 1, 258)
            query = text.rpartition("< ")[2].partition(" >")[0]
            answer = text.partition(f"< {query} >\nOutput: ")[2]
            logits[0, 0, ord(answer[0]) + 2] = 1
            return type("Output", (), {"logits": logits})

    for query, answer in (("red", "cat"), ("blue", "dog")):
        assert few_shot(Echo(), Letters(), ["red", "blue", query], ["cat", "dog"]) == answer


def test_episodes_have_an_example_of_each_class_and_another_image_as_query():
    labels, queries = torch.tensor([0, 1, 0, 1, 2, 2, 3]), set()
    for *examples, query in episodes(labels, 2, 1, 60):
        of_examples = labels[examples].tolist()
        assert len(set(of_examples)) == 2 and 3 not in of_examples  # class 3 has one image
        assert labels[query] in of_examples and query not in examples
        queries.add((of_examples.index(labels[query]), query))
    assert queries == {(i, query) for i in range(2) for query in range(6)}
    assert list(episodes(labels, 2, 1, 3, seed=1)) != list(episodes(labels, 2, 1, 3, seed=2))
    with pytest.raises(ValueError, match="as many with more than 2 images"):
        list(episodes(labels, 2, 2, 1))
