"""Every method looks like itself, to everyone, on the white ground of the figures."""

import io

import matplotlib

matplotlib.use("agg")

import numpy as np
import pytest
from PIL import Image

from sparsity_lib import style
from sparsity_lib.errors import SparsityError


def luminance(color: str) -> float:
    channels = [int(color[at: at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_no_two_methods_look_alike():
    looks = [(look.color, look.marker, str(look.linestyle)) for look in style.LOOKS.values()]
    assert len(set(looks)) == len(looks)
    assert len({look.label for look in style.LOOKS.values()}) == len(looks)


@pytest.mark.parametrize("method", style.LOOKS)
def test_contrast_on_white_is_at_least_three_to_one(method):
    assert 1.05 / (luminance(style.COLORS[method]) + 0.05) >= 3.0


def test_methods_that_share_a_figure_most_often_differ_in_colour():
    together = ["dense", "cats", "claws", "larosa", "oracle", "teal", "scap"]
    assert len({style.COLORS[method] for method in together}) == len(together)


def test_figures_are_the_same_byte_for_byte():
    import io

    import matplotlib.pyplot as plt

    pictures = []
    for _ in range(2):
        figure, axes = style.figure(1, 2)
        style.line(axes[0], "claws", [0, 1], [1, 2], low=[0, 1], high=[2, 3])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(figure)
        pictures.append(buffer.getvalue())
    assert pictures[0] == pictures[1] and b"Software" not in pictures[0]


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(SparsityError, match="did you mean 'claws'"):
        style.look("clows")


def picture(draw):
    figure, axes = style.figure()
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    matplotlib.pyplot.close(figure)
    return buffer.getvalue()


def test_curves_take_half_the_bytes_and_look_the_same():
    def draw(axes):
        for i, method in enumerate(("claws", "cats", "teal", "wina")):
            style.line(axes, method, range(9), [k * i for k in range(9)], low=[k * i - 1 for k in range(9)],
                       high=[k * i + 1 for k in range(9)])

    png = picture(draw)
    small = style.compact(png)
    assert len(small) < len(png) / 2 and small == style.compact(png)
    before, after = (np.asarray(Image.open(io.BytesIO(each)).convert("RGB"), dtype=int) for each in (png, small))
    assert before.shape == after.shape and np.abs(before - after).mean() < 0.5


def test_a_picture_of_many_colours_stays_what_it_was():
    noise = np.random.default_rng(0).random((200, 200, 3))
    png = picture(lambda axes: axes.imshow(noise, interpolation="none"))
    assert style.compact(png) == png
