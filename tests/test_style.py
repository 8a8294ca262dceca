"""Every method looks like itself, to everyone, on the white ground of the figures."""

import matplotlib

matplotlib.use("agg")

import pytest

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
