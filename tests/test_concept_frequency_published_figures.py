"""Figures: our panels above, the authors' below, in rows of limited width."""

import matplotlib.pyplot as plt
from PIL import Image

from concept_frequency.published import figures
from concept_frequency.statistics import log_linear_curve


def test_styles_and_legends():
    for count in (2, 3, 9):
        assert len({figures.style(i, count) for i in range(count)}) == count
    assert (
        figures.legend("RN50", 0.966, 1e-5) == "RN50, ρ=0.97**" and figures.legend("RN50", 0.5, 0.1) == "RN50, ρ=0.50"
    )


def test_panels_above_images(tmp_path):
    Image.new("RGBA", (3000, 2000), (255, 0, 0, 0)).save(tmp_path / "theirs.png")
    curve = log_linear_curve([1, 10, 100, 1000], [1.0, 2.0, 3.0, 4.0], 4)
    drawn = []

    def draw(axis: plt.Axes) -> None:
        figures.draw_curve(axis, curve, slice(1, None), "a", interval=True)
        figures.frame(axis, "score")
        drawn.append(axis)

    columns = [figures.Column(str(i), draw, tmp_path / "theirs.png" if i == 0 else None) for i in range(8)]
    figures.save(columns, tmp_path / "ours.png", "title")
    assert len(drawn) == 8 and all(axis.get_xscale() == "log" for axis in drawn)
    with Image.open(tmp_path / "ours.png") as image:
        wide, high = image.size
    figures.save(columns[1:3], tmp_path / "few.png", "title")  # without an image of theirs: one row
    with Image.open(tmp_path / "few.png") as image:
        assert image.size[0] < wide and image.size[1] < high
    white = figures.thumbnail(tmp_path / "theirs.png")
    assert white.size == (900, 600) and white.getpixel((5, 5)) == (255, 255, 255)
