"""All forms of captions of scenes."""

from scene_corpora import SETTING, bank  # noqa: F401

from studies.corpora import captions, scenes, sprites


def test_captions(bank: sprites.Sprites) -> None:
    shown = scenes.Scenes(SETTING, sprites=bank)
    scene = next(scene for scene in map(shown.draw, range(50)) if len(scene.concepts) == 3)
    names = [shown.classnames[concept] for concept in scene.concepts]
    texts = {form: shown.caption(scene, 0, form) for form in captions.FORMS}
    assert texts["names"] == f"{names[0]}, {names[1]} and {names[2]}"
    assert all(name in text for name in names for text in texts.values())
    assert len(texts["long"].split(". ")) == 6 and len(texts["long"].split()) > 60
    assert (
        captions.at_place((0, 0, 10), 48) == "at the top left"
        and captions.at_place((20, 20, 10), 48) == "in the middle"
    )
    assert (
        captions.relation((0, 0, 10), (0, 30, 20)) == "to the left of"
        and captions.relation((30, 0, 8), (0, 5, 8)) == "below"
    )
