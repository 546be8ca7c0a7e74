"""Figures as PNG, as `<img>` with an alt text, and as JupyterLab shows them."""

import base64
import html
import io
import threading

# matplotlib is not made for two threads, and an answer may come from another one
DRAWING = threading.RLock()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def img(png: bytes, alt: str, width: int | None = None) -> str:
    """An image element; ``alt`` says in words what it shows."""
    size = (
        f"display:block;width:{width}px;image-rendering:pixelated;" if width else "max-width:100%;"
    )
    return f'<img src="{data_uri(png)}" alt="{html.escape(alt, quote=True)}" style="{size}background:white">'


def figure_png(figure) -> bytes:
    """Any figure as notebooks show it."""
    buffer = io.BytesIO()
    with DRAWING:
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def describe_figures() -> None:
    """From now on JupyterLab shows figures with the alt text of their cell's metadata: ``"alt"``,
    one or a list.

    It tells the kernel that metadata, but gives a PNG's `<img>` no alt text (Jupyter's enhancement
    proposal 120); so a figure goes out as HTML too, which it prefers. Elsewhere, and for cells
    without alt texts, nothing changes.
    """
    from IPython import get_ipython
    from matplotlib.figure import FigureBase

    shell = get_ipython()
    if not hasattr(shell, "get_parent"):  # no kernel
        return
    cell, shown = None, 0

    def described(figure) -> str | None:
        nonlocal cell, shown
        parent = shell.get_parent()
        alts = parent.get("metadata", {}).get("alt", [])
        alts = [alts] if isinstance(alts, str) else alts
        run = parent.get("header", {}).get("msg_id")
        cell, shown = run, shown + 1 if run == cell else 1
        return img(figure_png(figure), alts[shown - 1]) if shown <= len(alts) else None

    # For the base class, since whoever chooses the inline backend forgets all formatters of
    # `Figure`.
    shell.display_formatter.formatters["text/html"].for_type(FigureBase, described)
