"""Figures as PNG bytes, as `<img>` elements with alt texts, and as JupyterLab shows them."""

import base64
import html
import io
import threading

# Matplotlib is not thread-safe, and a widget may draw from a background thread.
DRAWING = threading.RLock()


def plain(text: object) -> str:
    """A name as figures can show it, whatever it holds: no formula, no half characters."""
    return str(text).encode("utf-8", "replace").decode().replace("$", r"\$")


def data_uri(png: bytes) -> str:
    """The image itself as a URL, so that the HTML needs no second file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def img(png: bytes, alt: str, width: int | None = None) -> str:
    """An image element; ``alt`` says in words what it shows, ``width`` is in pixels."""
    if width:
        size = f"display:block;width:{width}px;image-rendering:pixelated;"
    else:
        size = "max-width:100%;"
    described = html.escape(alt, quote=True)
    return f'<img src="{data_uri(png)}" alt="{described}" style="{size}background:white">'


def figure_png(figure) -> bytes:
    """The PNG of any Matplotlib figure, in the size in which notebooks show it."""
    buffer = io.BytesIO()
    with DRAWING:
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def describe_figures() -> None:
    """Let JupyterLab show figures with the alt texts from their cell's metadata.

    The metadata's ``"alt"`` is one text, or a list with one for each figure of the cell. JupyterLab
    passes the metadata to the kernel, but its `<img>` for a PNG gets no alt text (Jupyter
    enhancement proposal 120). So a figure is sent as HTML too, which JupyterLab prefers. Elsewhere,
    and for cells without alt texts, nothing changes.
    """
    from IPython import get_ipython
    from matplotlib.figure import FigureBase

    shell = get_ipython()
    if not hasattr(shell, "get_parent"):  # no kernel
        return
    last_run = None
    shown = 0  # figures of this run of the cell

    def described(figure) -> str | None:
        nonlocal last_run, shown
        parent = shell.get_parent()
        alts = parent.get("metadata", {}).get("alt", [])
        alts = [alts] if isinstance(alts, str) else alts
        run = parent.get("header", {}).get("msg_id")
        shown = shown + 1 if run == last_run else 1
        last_run = run
        return img(figure_png(figure), alts[shown - 1]) if shown <= len(alts) else None

    # Registered for the base class: choosing the inline backend drops all formatters of `Figure`.
    shell.display_formatter.formatters["text/html"].for_type(FigureBase, described)
