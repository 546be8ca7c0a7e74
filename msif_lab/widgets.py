"""Explorers for JupyterLab: live controls where a kernel runs, a picture everywhere else."""

import base64
import functools
import io
import traceback
from collections.abc import Mapping, Sequence

from . import plots
from .data import Examples
from .influence import Influence

__all__ = ["InfluenceExplorer"]


class InfluenceExplorer:
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
        import matplotlib.pyplot as plt
        from IPython.display import display

        wide = {"description_width": "initial"}
        query = ipywidgets.IntSlider(
            0, 0, len(self.queries) - 1, description="Query number", continuous_update=False, style=wide
        )
        case = ipywidgets.ToggleButtons(options=list(self.scores), description="Case")
        picture = ipywidgets.Output()

        def draw(_=None):
            with picture:
                picture.clear_output(wait=True)
                try:
                    for figure in self.static([query.value], case.value):
                        display(figure)
                        plt.close(figure)
                except Exception:
                    print(traceback.format_exc())  # a callback's error is lost unless it is printed here

        query.observe(draw, "value")
        case.observe(draw, "value")
        draw()
        return ipywidgets.VBox([ipywidgets.HBox([query, case]), picture])

    def _repr_mimebundle_(self, include=None, exclude=None):
        import matplotlib.pyplot as plt

        bundle = self.widget._repr_mimebundle_()
        bundle = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        (figure,) = self.static()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        text = (
            f"InfluenceExplorer: {len(self.queries)} queries, {len(self.examples)} examples, cases {list(self.scores)}"
        )
        return bundle | {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": text}
