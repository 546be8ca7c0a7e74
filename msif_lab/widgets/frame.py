"""What explorers share: controls, visible errors, stoppable work, the view as code, a picture."""

import base64
import functools
import html
import threading
import traceback
from collections.abc import Callable, Sequence

from ..figures import figure_png
from ..pipeline.pipeline import Pipeline
from .background import Job

__all__ = ["WIDE", "Explorer", "need_choice"]

WIDE = {"description_width": "initial"}
# While the kernel runs something else, nothing that a reader does here has an effect. The kernel
# cannot say so itself; JupyterLab's own indicator knows, and the line below a view follows it. It
# waits a moment, or it would flicker at each step of a slider.
WAITING = (
    "<style>.msif-waiting{visibility:hidden}"
    ".jp-NotebookPanel:has(.jp-Notebook-ExecutionIndicator[data-status=busy]) .msif-waiting"
    "{animation:msif-waiting 0s 0.5s forwards}@keyframes msif-waiting{to{visibility:visible}}"
    "</style><i>waiting for the kernel …</i>"
)


def _note(text: str) -> str:
    """A line that screen readers announce when it changes."""
    attributes = 'role="status" aria-live="polite" style="min-height:1.5em"'
    return f"<div {attributes}>{html.escape(text)}</div>"


class Explorer:
    """The frame of every explorer: a live view, visible errors, and a picture without a kernel.

    A subclass defines ``kind`` (a word, for the style class), `_build` (its controls), `_show`
    (redraws the view), `static` and `code`. Its state is in plain attributes, so that `static` and
    `code` need no ipywidgets.
    """

    kind = "explorer"
    job: Job | None = None

    @functools.cached_property
    def _lock(self):
        return threading.RLock()

    # --- controls ---------------------------------------------------------------------------------

    @functools.cached_property
    def widget(self):
        """The live view: labelled controls that work from the keyboard, pictures, and any error."""
        import ipywidgets

        self.error = self._style(ipywidgets.Output(), "error")
        waiting = self._html("waiting")
        waiting.value = WAITING
        box = self._style(ipywidgets.VBox([*self._build(), waiting, self.error]), "explorer")
        box.add_class(f"msif-{self.kind}")
        self._guarded(self._show)()
        return box

    def _build(self) -> list:
        raise TypeError(f"{type(self).__name__} must define _build")

    def _show(self) -> None:
        raise TypeError(f"{type(self).__name__} must define _show")

    @staticmethod
    def _style(widget, name: str):
        widget.add_class(f"msif-{name}")
        return widget

    def _html(self, name: str):
        import ipywidgets

        return self._style(ipywidgets.HTML(), name)

    def _control(
        self, kind: str, name: str, description: str, on_value: Callable | None = None, **settings
    ):
        """A labelled control of ipywidgets.

        Args:
            kind: name of its class, such as ``"Dropdown"``.
            name: its style class.
            description: its label.
            on_value: called with every new value, from a button without one; its errors are shown.
            settings: of the class.
        """
        import ipywidgets

        if kind != "Button":
            settings["style"] = WIDE
        control = getattr(ipywidgets, kind)(description=description, **settings)
        if kind == "Button":
            control.on_click(self._guarded(lambda _: on_value()))
        elif on_value is not None:
            control.observe(self._guarded(lambda change: on_value(change["new"])), "value")
        return self._style(control, name)

    def _guarded(self, function: Callable) -> Callable:
        """The callback, its errors shown until the next action; otherwise they would be lost."""

        @functools.wraps(function)
        def call(*given):
            with self._lock:  # a retraining may end while a slider moves
                # Cleared first: a retraining that the callback starts may fail before it returns.
                self.error.outputs = ()
                try:
                    function(*given)
                except Exception as error:
                    self._complain(error)

        return call

    def _complain(self, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        self.error.outputs = ({"output_type": "stream", "name": "stderr", "text": text},)

    # --- the view as code -------------------------------------------------------------------------

    def code(self) -> str:
        """Python that computes what the view shows from the objects that the explorer was given."""
        raise TypeError(f"{type(self).__name__} must define code")

    def _code_box(self):
        """A button that shows the present view's code, ready to be copied."""
        import ipywidgets

        text = ipywidgets.Textarea(
            description="Code of this view (select all, copy)",
            style=WIDE,
            rows=12,
            layout={"width": "100%", "display": "none"},
        )

        def toggle():
            hidden = text.layout.display == "none"
            if hidden:
                text.value = self.code()
            text.layout.display = None if hidden else "none"
            button.description = "Hide the code" if hidden else "Copy as code"

        button = self._control("Button", "code-button", "Copy as code", toggle)
        self._code_text = text
        return self._style(ipywidgets.VBox([button, text]), "code")

    def _refresh_code(self) -> None:
        """If the code is shown, bring it up to date with the view."""
        if self._code_text.layout.display != "none":
            self._code_text.value = self.code()

    def _name(self, thing, default: str) -> str:
        """The reader's own name for an object, so that the code runs in the same notebook."""
        from IPython import get_ipython

        shell = get_ipython()
        known = {} if shell is None else dict(shell.user_ns)
        for name, value in known.items():
            if value is thing and not name.startswith("_"):
                return name
        return default

    # --- retraining -------------------------------------------------------------------------------

    def _retraining(self, text: str, start: Callable):
        """A button that starts, one that stops, and a line that says what is going on."""
        import ipywidgets

        layout = {"width": "auto"}
        self.retrain = self._control("Button", "retrain", text, start, layout=layout)
        self.stop = self._control(
            "Button", "stop", "Stop", self._stop, layout=layout, disabled=True
        )
        self.status = self._html("status")
        self.status.value = _note("")
        return ipywidgets.HBox([self.retrain, self.stop, self.status])

    def _stop(self) -> None:
        if self.job is None:
            return
        self.status.value = _note("stopping …")
        self.job.stop()

    def _run(self, pipeline: Pipeline, work: Callable, done: Callable) -> None:
        """Do ``work(copy of the pipeline)`` in a thread; ``done(result)`` then shows its result."""
        if self.job is not None and self.job.running:
            raise ValueError("a retraining is still running; stop it, or wait for it")

        def end(text: str) -> None:
            self.stop.disabled = True
            self.retrain.disabled = False
            self.status.value = _note(text)

        def finished(result, seconds: float) -> None:
            self._guarded(done)(result)
            end(f"done in {seconds:.1f} s")

        def failed(error: Exception) -> None:
            self._complain(error)
            end("failed: see the error below")

        def tick(seconds: float) -> None:
            self.status.value = _note(f"retraining {stages}, {seconds:.0f} s")

        def stopped() -> None:
            end("stopped: nothing was changed")

        count = len(pipeline.stages)
        stages = {1: "the stage", 2: "both stages"}.get(count, f"{count} stages")
        self.status.value = _note(f"retraining {stages} …")
        self.retrain.disabled = True
        self.stop.disabled = False
        try:
            self.job = Job(pipeline, work, done=finished, stopped=stopped, failed=failed, tick=tick)
        except Exception:
            end("failed: see the error below")
            raise

    # --- without a kernel -------------------------------------------------------------------------

    def static(self) -> list:
        """Figures for readers without a kernel."""
        raise TypeError(f"{type(self).__name__} must define static")

    def _still(self) -> bytes:
        """The PNG for readers without a kernel."""
        import matplotlib.pyplot as plt

        figure = self.static()[0]
        png = figure_png(figure)
        plt.close(figure)
        return png

    def _repr_mimebundle_(self, include=None, exclude=None):
        try:
            bundle = self.widget._repr_mimebundle_()
        except ModuleNotFoundError as error:
            if error.name != "ipywidgets":
                raise
            bundle = {}  # without ipywidgets there is still the picture
        bundle = dict(bundle[0] if isinstance(bundle, tuple) else bundle)
        return bundle | {
            "image/png": base64.b64encode(self._still()).decode(),
            "text/plain": repr(self),
        }


def need_choice(name: str, value, options: Sequence) -> None:
    """Raise `ValueError` unless ``value`` is one of ``options``."""
    if value not in list(options):
        raise ValueError(f"{name}={value!r} is none of {list(options)}")
