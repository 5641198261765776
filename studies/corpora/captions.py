"""Captions of scenes: names of emoji, names with tags, names with positions, or several sentences."""

import random
from collections.abc import Sequence

from studies.corpora.emoji_sources import Emoji

FORMS = ("names", "tags", "positions", "long")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")


def write_caption(
    form: str, emoji: Sequence[Emoji], boxes: Sequence[tuple[int, int, int]], size: int, rng: random.Random
) -> str:
    """The caption, in one of FORMS, of a picture of side `size` with `emoji` in `boxes` (top, left, side)."""
    names = [one.name for one in emoji]
    if form == "names":
        return listed(names)
    if form == "tags":
        return ", ".join(" ".join([one.name, *some_tags(one, 2, rng)]) for one in emoji)
    places = [at_place(box, size) for box in boxes]
    if form == "positions":
        return listed([f"{name} {place}" for name, place in zip(names, places, strict=True)])
    order = sorted(range(len(emoji)), key=lambda i: boxes[i])
    sentences = [f"The picture shows {listed(names)}."]
    for i in order:
        tags, words = some_tags(emoji[i], 4, rng), emoji[i].words
        known = f", also known as {listed(tags, 'or')}" if tags else ""
        sentences.append(
            f"{places[i].capitalize()} there is {names[i]}{known}; it is one of the emoji for {words['subgroup']}, "
            f"which belong to {words['group']}."
        )
    for i, j in zip(order, order[1:], strict=False):
        sentences.append(f"The {names[i]} is {relation(boxes[i], boxes[j])} the {names[j]}.")
    return " ".join(sentences)


def some_tags(emoji: Emoji, most: int, rng: random.Random) -> list[str]:
    return rng.sample(emoji.tags, min(len(emoji.tags), most))


def listed(names: Sequence[str], last: str = "and") -> str:
    """Join names as in "a, b and c"; `last` stands before the last name."""
    return f" {last} ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def at_place(box: tuple[int, int, int], size: int) -> str:
    """Position of a box's centre in a 3 x 3 grid, in words."""
    row, column = (min(3 * (2 * start + box[2]) // (2 * size), 2) for start in box[:2])
    place = PLACES[3 * row + column]
    return "in the middle" if place == "middle" else f"at the {place}"


def relation(one: tuple[int, int, int], other: tuple[int, int, int]) -> str:
    """Position of one box relative to another, in words, along the axis where their centres are further apart."""
    down, right = (2 * (other[axis] - one[axis]) + other[2] - one[2] for axis in (0, 1))
    if abs(right) > abs(down):
        return "to the left of" if right > 0 else "to the right of"
    return "above" if down > 0 else "below"
