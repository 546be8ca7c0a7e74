"""A figure for each setting of a slider."""

from collections.abc import Callable, Sequence

from ..arguments import check_function, listed, shown
from ..figures import figure_png, img
from .frame import Explorer
from .given import quoted

__all__ = ["FigureSlider"]


class FigureSlider(Explorer):
    """One figure for each setting of a slider.

    Args:
        draw: ``draw(value)`` returns a matplotlib figure.
        values: the settings, in the slider's order.
        description: the slider's label.
        start: the setting shown first; default the first.
        alt: ``alt(value)`` returns what the figure shows, in words, for readers who cannot see it;
            default the setting.
        precompute: draw all settings when the slider is first shown, so that it then moves without
            waiting; otherwise each is drawn when it is first chosen.

    As a cell's last value it shows the live slider; `static` draws one figure per setting, which
    needs no kernel.
    """

    kind = "slider"

    def __init__(
        self,
        draw: Callable,
        values: Sequence,
        description: str,
        start=None,
        *,
        alt: Callable | None = None,
        precompute: bool = True,
    ):
        check_function("draw", draw, "draw(value) that returns a matplotlib figure")
        if alt is not None:
            check_function("alt", alt, "alt(value) that returns words")
        if not isinstance(description, str):
            raise TypeError(f"description={shown(description)} must be text, the slider's label")
        self.draw = draw
        self.values = listed("values", values, "a list of the slider's settings")
        self.description = description
        if not self.values:
            raise ValueError("values is empty; give the settings of the slider")
        if start is not None and start not in self.values:
            raise ValueError(f"start={start!r} is not one of the values {self.values}")
        self.start = self.values[0] if start is None else start
        self.alt = alt or (lambda value: f"Figure for {description} {value}")
        self.precompute = precompute
        self._drawn: dict[int, bytes] = {}

    def static(self, values: Sequence | None = None) -> list:
        """One figure per setting; by default for all of them."""
        return [self.draw(value) for value in (self.values if values is None else values)]

    def _png(self, value) -> bytes:
        import matplotlib.pyplot as plt

        place = self.values.index(value)
        if place not in self._drawn:
            figure = self.draw(value)
            self._drawn[place] = figure_png(figure)
            plt.close(figure)
        return self._drawn[place]

    def _still(self):
        return self._png(self.start)

    def _build(self):
        self.control = self._control(
            "SelectionSlider",
            "value",
            self.description,
            lambda _: self._show(),
            options=[(str(v), v) for v in self.values],
            value=self.start,
            continuous_update=False,
        )
        self.plot = self._html("plot")
        return [self.control, self.plot]

    def _show(self):
        value = self.control.value
        self.plot.value = img(self._png(value), self.alt(value))
        if self.precompute:
            for other in self.values:
                self._png(other)
            self.precompute = False

    def code(self) -> str:
        """The call that draws the present figure."""
        value = self.control.value if "widget" in vars(self) else self.start
        return f"figure = {self._name(self.draw, 'draw')}({quoted(value)})"

    def __repr__(self) -> str:
        return (
            f"FigureSlider: {self.description}, {len(self.values)} settings from {self.values[0]} "
            f"to {self.values[-1]}"
        )
