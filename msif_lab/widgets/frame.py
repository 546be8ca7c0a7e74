"""Explorers for JupyterLab: live controls where a kernel runs, a picture everywhere else."""

import base64
import functools
import io
import traceback
from collections.abc import Callable, Mapping, Sequence

from . import plots
from .data import Examples
from .influence import Influence

__all__ = ["FigureSlider", "InfluenceExplorer"]


class _Explorer:
    """What explorers share: a picture that redraws, errors in sight, and a mimebundle with picture and text."""

    def _picture(self, figures: Callable[[], Sequence]):
        """An output area and the function that redraws it from ``figures()``."""
        import ipywidgets
        import matplotlib.pyplot as plt
        from IPython.display import display

        picture = ipywidgets.Output()

        def draw(_=None):
            with picture:
                picture.clear_output(wait=True)
                try:
                    for figure in figures():
                        display(figure)
                        plt.close(figure)
                except Exception:
                    print(traceback.format_exc())  # a callback's error is lost unless it is printed here

        return picture, draw

    def _still(self):
        """The figure for readers without a kernel."""
        return self.static()[0]

    def _repr_mimebundle_(self, include=None, exclude=None):
        import matplotlib.pyplot as plt

        bundle = self.widget._repr_mimebundle_()
        bundle = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        figure = self._still()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        return bundle | {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": repr(self)}


class FigureSlider(_Explorer):
    """One figure for each setting of a slider.

    Args:
        draw: ``draw(value)`` → a matplotlib figure; cheap, so compute before.
        values: the settings, in the slider's order.
        description: the slider's label.
        start: the setting shown first; default the first.

    As a cell's last value it shows the live slider; `static` draws one figure per setting, no kernel needed.
    """

    def __init__(self, draw: Callable, values: Sequence, description: str, start=None):
        self.draw, self.values, self.description = draw, list(values), description
        if not self.values:
            raise ValueError("values is empty; give the settings of the slider")
        if start is not None and start not in self.values:
            raise ValueError(f"start={start!r} is not one of the values {self.values}")
        self.start = self.values[0] if start is None else start

    def static(self, values: Sequence | None = None) -> list:
        """One figure per setting (all of them by default)."""
        return [self.draw(value) for value in (self.values if values is None else values)]

    def _still(self):
        return self.draw(self.start)

    @functools.cached_property
    def widget(self):
        """A labelled slider over the settings, the picture, and any error in sight."""
        import ipywidgets

        slider = ipywidgets.SelectionSlider(
            options=[(str(v), v) for v in self.values],
            value=self.start,
            description=self.description,
            continuous_update=False,
            style={"description_width": "initial"},
        )
        picture, draw = self._picture(lambda: [self.draw(slider.value)])
        slider.observe(draw, "value")
        draw()
        return ipywidgets.VBox([slider, picture])

    def __repr__(self) -> str:
        return (
            f"FigureSlider: {self.description}, {len(self.values)} settings from {self.values[0]} to {self.values[-1]}"
        )


class InfluenceExplorer(_Explorer):
    """Pick a query and a case; see its most helpful and most harmful examples.

    Args:
        scores: one `Influence`, or several by name (``{"frozen": ..., "full": ...}``), on the same queries.
        examples: the scored stage's images.
        queries: the queries' images.
        k: pictures a row.

    As a cell's last value it shows the live view; `static` draws small multiples that need no kernel.
    """

    def __init__(
        self, scores: Influence | Mapping[str, Influence], examples: Examples, queries: Examples, *, k: int = 5
    ):
        self.scores = dict(scores) if isinstance(scores, Mapping) else {"scores": scores}
        self.examples, self.queries, self.k = examples, queries, k
        for name, one in self.scores.items():
            if len(one) != len(queries) or len(one.ids) != len(examples):
                raise ValueError(
                    f"scores[{name!r}] is {tuple(one.values.shape)}, expected ({len(queries)}, {len(examples)})"
                )

    def static(self, queries: Sequence[int] = (0,), case: str | None = None) -> list:
        """One figure per query position, for readers without a kernel."""
        scores = self.scores[case or next(iter(self.scores))]
        return [plots.influence_grid(scores, self.examples, self.queries, query, self.k) for query in queries]

    @functools.cached_property
    def widget(self):
        """The live view: labelled controls that work from the keyboard, the picture, and any error in sight."""
        import ipywidgets

        wide = {"description_width": "initial"}
        query = ipywidgets.IntSlider(
            0, 0, len(self.queries) - 1, description="Query number", continuous_update=False, style=wide
        )
        case = ipywidgets.ToggleButtons(options=list(self.scores), description="Case")
        picture, draw = self._picture(lambda: self.static([query.value], case.value))
        query.observe(draw, "value")
        case.observe(draw, "value")
        draw()
        return ipywidgets.VBox([ipywidgets.HBox([query, case]), picture])

    def __repr__(self) -> str:
        return (
            f"InfluenceExplorer: {len(self.queries)} queries, {len(self.examples)} examples, cases {list(self.scores)}"
        )
