"""Pictures as text: `<img>` with its bytes and alt text, which a slider swaps in milliseconds."""

import functools
import html
import io

import numpy
import torch

from .. import plots
from ..data.examples import Examples
from ..figures import DRAWING, img
from ..influence.result import Influence

CARD_WIDTH = 92  # pixels of a picture's column, and of the button below it with its margins
# A button reaches over its picture, up to the edge of their box, so that a click on the picture is
# a click on the button.
CLICKABLE = (
    ".msif-cards{position:relative;overflow:auto hidden}.msif-cards>.widget-hbox{overflow:visible}"
    ".msif-card.jupyter-button{position:relative;overflow:visible}"
    ".msif-card::before{content:'';position:absolute;bottom:100%;left:-2px;right:-2px;"
    "height:1000px;cursor:pointer}"
)
CARD = "display:inline-block;text-align:center;vertical-align:top;line-height:1.35"


def image_png(image: torch.Tensor) -> bytes:
    """A ``(C, H, W)`` image as PNG: one channel from white (least) to black, three from 0 to 1."""
    from PIL import Image

    values = image.detach().cpu().double()
    if len(values) == 1:
        low = float(values.min())
        high = float(values.max())
        values = 1 - (values[0] - low) / (high - low or 1.0)
    else:
        values = values.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray((values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


class Gallery:
    """The images of some examples, each made into a PNG once."""

    def __init__(self, examples: Examples, name: str):
        shape = tuple(examples.x.shape)
        if len(shape) != 4 or shape[1] not in (1, 3):
            fields = getattr(examples.x, "field_names", None)
            held = f"the fields {fields}" if fields else f"inputs of shape {shape}"
            way_out = "scores without pictures are in scores.to_frame()"
            if not fields:
                way_out = f"reshape the inputs, and let the model flatten them, or: {way_out}"
            raise ValueError(
                f"{name} hold {held}: an explorer needs pictures, "
                f"(N, 1, H, W) or (N, 3, H, W); {way_out}"
            )
        self.examples = examples
        self.png = functools.lru_cache(maxsize=4096)(
            lambda position: image_png(examples.x[position])
        )

    def label(self, position: int) -> str:
        """The example's label in words: its class by name, or its target."""
        y = self.examples.y[position]
        if self.examples.has_labels:
            return f"label {self.examples.classes[int(y)]}"
        return f"target {float(y.reshape(-1)[0]):.3g}" if y.numel() == 1 else "target"

    def number(self, position: int) -> int:
        """The example's id."""
        return int(self.examples.ids[position])

    def show(
        self,
        position: int,
        what: str,
        *,
        width: int = 64,
        caption: str = "",
        border: str = "none",
        column: int = CARD_WIDTH,
    ) -> str:
        """The picture of one example with a caption below; ``what`` starts its alt text."""
        alt = f"{what}, id {self.number(position)}, {self.label(position)}"
        picture = img(self.png(position), alt, width)
        below = caption or html.escape(self.label(position))
        return (
            f'<div style="{CARD};width:{column}px">'
            f'<div style="display:inline-block;border:{border}">{picture}</div>'
            f"<div>{below}</div></div>"
        )

    def show_score(self, position: int, value: float, scores: Influence) -> str:
        """The picture of one example with its score: its kind in the alt text and as a border."""
        kind = scores.kind(value)
        thousandths = signed(1e3 * value, 2)
        return self.show(
            position,
            f"{kind.capitalize()} example, score {thousandths} thousandths",
            caption=f"{html.escape(self.label(position))}<br>{thousandths}",
            border=f"3px solid {plots.COLOURS[kind]}",
        )


class Plot:
    """One matplotlib figure that is kept: artists change, the rest is drawn once.

    ``draw`` gets the figure and returns the artists that the owner will change. No layout engine
    and no pyplot: they cost more than all of the drawing. What moves with every step is drawn over
    the rest (`png`), or laid over the picture by the browser (`over`).
    """

    def __init__(self, draw, width: float = 4.2, height: float = 3.0):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with DRAWING:
            self.figure = Figure(figsize=(width, height), dpi=100, layout="none", facecolor="white")
            FigureCanvasAgg(self.figure)
            self.artists = draw(self.figure)
        self._still = None

    def png(self, *moving) -> bytes:
        """The figure as it is now, as PNG.

        With ``moving`` artists only these are drawn anew, over what was there at first.
        """
        from PIL import Image

        with DRAWING:
            canvas = self.figure.canvas
            if self._still is None or not moving:
                for artist in moving:
                    artist.set_animated(True)
                canvas.draw()
                self._still = canvas.copy_from_bbox(self.figure.bbox)
            canvas.restore_region(self._still)
            for artist in moving:
                artist.axes.draw_artist(artist)
            buffer = io.BytesIO()
            Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB").save(
                buffer, "PNG", compress_level=1
            )
        return buffer.getvalue()

    def over(self, ax, x: float) -> str:
        """A dotted vertical line at ``x``, as HTML to go over the picture in one block with it."""
        box = ax.get_position()
        low, high = ax.get_xlim()
        across = box.x0 + (x - low) / (high - low) * (box.x1 - box.x0)
        return (
            f'<div style="position:absolute;border-left:2px dotted black;left:{100 * across:.2f}%;'
            f'top:{100 * (1 - box.y1):.2f}%;height:{100 * (box.y1 - box.y0):.2f}%"></div>'
        )


def open_axes(figure, **margins):
    """One pair of axes without the lines at the top and on the right."""
    ax = figure.subplots()
    figure.subplots_adjust(right=0.97, **margins)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def effects_axes(figure):
    """Axes over the queries, with the predicted and the actual changes."""
    ax = open_axes(figure, left=0.23, top=0.97, bottom=0.16)
    ax.axhline(0, color=plots.NEUTRAL, lw=0.8)
    (guess,) = ax.plot([], [], "o", ms=6, mfc="none", color=plots.HELPFUL, label="predicted")
    (truth,) = ax.plot([], [], "x", ms=5, color=plots.HARMFUL)
    ax.set_xlabel("query (dotted: the one in view)", fontsize=9)
    return ax, guess, truth


def signed(value: float, digits: int = 4) -> str:
    """``+0.0123`` or ``−0.0123``, with a real minus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def table(caption: str, rows, head=()) -> str:
    """An HTML table of plain texts.

    Args:
        caption: what it shows.
        rows: of a name and its cells.
        head: names of the columns of cells; none for no head.
    """
    gap = "padding:0 0.8em;text-align"
    top = "".join(f"<th scope='col' style='{gap}:right'>{html.escape(text)}</th>" for text in head)
    parts = [f"<caption>{html.escape(caption)}</caption>"]
    if top:
        parts.append(f"<tr><td></td>{top}</tr>")
    for name, *cells in rows:
        first = f"<th scope='row' style='{gap}:left'>{html.escape(name)}</th>"
        others = [f"<td style='{gap}:right'>{html.escape(cell)}</td>" for cell in cells]
        parts.append(f"<tr>{first}{''.join(others)}</tr>")
    return f"<table>{''.join(parts)}</table>"


class Cards:
    """A row of pictures, each chosen by a click on it or on the button below, which Tab reaches.

    The pictures are one HTML widget, because a slider waits for every widget that changes.

    Args:
        explorer: whose errors the buttons report to.
        count: the most pictures it holds.
        name: style class of the buttons.
        choose: ``choose(place)`` of the picture whose button was pressed.
    """

    def __init__(self, explorer, count: int, name: str, choose):
        import ipywidgets

        self.places: list[int] = []
        self.pictures = ipywidgets.HTML()
        width = {"width": f"{CARD_WIDTH - 4}px", "padding": "0", "display": "none"}
        self.buttons = [
            explorer._control("Button", name, "", lambda i=i: choose(self.places[i]), layout=width)
            for i in range(count)
        ]
        for button in self.buttons:
            button.add_class("msif-card")
        style = ipywidgets.HTML(f"<style>{CLICKABLE}</style>", layout={"display": "none"})
        self.box = ipywidgets.VBox([style, self.pictures, ipywidgets.HBox(self.buttons)])
        self.box.add_class("msif-cards")

    def __len__(self) -> int:
        return len(self.buttons)

    def show(self, cards) -> None:
        """Show some cards, ``(place, picture, button's text, whether it is chosen)`` each.

        What has not changed is not sent to the browser.
        """
        cards = list(cards)
        self.places = [place for place, *_ in cards]
        pictures = "".join(picture for _, picture, _, _ in cards)
        self.pictures.value = f'<div style="white-space:nowrap">{pictures}</div>'
        for i, button in enumerate(self.buttons):
            button.layout.display = None if i < len(cards) else "none"
            if i < len(cards):
                _, _, text, chosen = cards[i]
                button.description = f"{text} ✓" if chosen else text
