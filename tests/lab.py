"""JupyterLab in a headless Chromium, used as a student uses it: by menus, keys and clicks.

Menus and editors are found by ARIA roles, text by what it says. Cells, prompts and outputs
have no role that tells them apart, so they are found by JupyterLab's classes ``jp-...``, on which
its themes and extensions rely. All of these classes are in this file.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

MINUTES = 60_000  # Playwright counts milliseconds; lessons are slow on two shared cores
# All cells are in the page, not only those in sight; the first start does not ask about news.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
BROKEN = (
    "model not found",
    "Error displaying widget",
    "Error creating widget",
    "Loading widget...",
)

NOTEBOOK = ".jp-Notebook"
CODE_CELL = f"{NOTEBOOK} .jp-CodeCell"
TEXT = ".jp-RenderedMarkdown"
OUTPUTS = ".jp-OutputArea"
PROMPT = ".jp-InputArea-prompt"
# A cell whose input is folded has no prompt, so the prompts are those of most cells, not of all.
PROMPTS = f"[...document.querySelectorAll('.jp-CodeCell {PROMPT}')].map(e => e.textContent)"
DONE = f"""() => {{
  const prompts = {PROMPTS};
  return prompts.some(t => /\\d/.test(t)) && !prompts.some(t => t.includes('*'));
}}"""

# From the key to the last change of the view with its pictures decoded: what a reader waits for.
WATCH = """root => {
  const view = () =>
    [...root.querySelectorAll('.msif-view, .msif-plot')].map(e => e.innerHTML).join();
  root.redraws = [];
  if (root.watched) return;
  root.watched = true;
  let start = 0, last = view();
  const pressed = () => { start = performance.now(); root.redraws.push(null) };
  root.addEventListener('keydown', pressed, true);
  new MutationObserver(async () => {
    const now = view(), redraws = root.redraws, began = start;
    if (!redraws.length || now === last) return;
    last = now;
    await Promise.all([...root.querySelectorAll('img')].map(i => i.decode().catch(() => 0)));
    redraws[redraws.length - 1] = performance.now() - began;
    root.changed = performance.now();
  }).observe(root, {subtree: true, childList: true, characterData: true, attributes: true});
}"""
REDRAWN = "root => root.redraws.at(-1) !== null && performance.now() - root.changed > 300"

# Each text that is shown, with the contrast to its background as WCAG 2 defines it:
# (L1 + 0.05) / (L2 + 0.05), where L are the relative luminances, the larger one first.
CONTRASTS = """root => {
  const rgba = s => {
    const v = s.match(/[\\d.]+/g).map(Number);
    return v.length < 4 ? [...v, 1] : v;
  };
  const light = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (a, b) => a.slice(0, 3).map((v, i) => v * a[3] + b[i] * (1 - a[3])).concat(1);
  const ground = e => {
    const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c;
    return over(c, e.parentElement ? ground(e.parentElement) : [255, 255, 255, 1]);
  };
  const texts = [], walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    const visible = e.checkVisibility({visibilityProperty: true});
    if (!text || !visible || e.matches(':disabled, option')) continue;
    const back = ground(e), front = over(rgba(getComputedStyle(e).color), back);
    const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
    texts.push([(high + 0.05) / (low + 0.05), text.slice(0, 40)]);
  }
  return texts;
}"""

# Everything the Tab key should reach, and what a screen reader would call it. ipywidgets leaves the
# label of a slider unconnected (no "for"), so a label in the same control counts as its name.
CONTROLS = """root => {
  const labels = e => [...(e.labels || [])].map(l => l.textContent).join(' ');
  const beside = e => e.closest('.jupyter-widgets')?.querySelector('label')?.textContent;
  const name = e =>
    e.getAttribute('aria-label') || labels(e) || e.textContent || e.title || beside(e) || '';
  return [...root.querySelectorAll('button, input, select, textarea, [tabindex="0"]')]
    .filter(e => e.checkVisibility() && !e.disabled)
    .map(e => ({
      what: e.getAttribute('role') || e.tagName.toLowerCase(),
      focusable: e.tabIndex >= 0,
      name: name(e).trim(),
    }));
}"""

# Formulas wider than their cell in a window of ordinary width: the beginnings of these cells.
CUT = f"""all => all.map(m => [m.querySelector('mjx-math'), m.closest('{TEXT}')])
  .filter(([m, cell]) => m.getBoundingClientRect().right > cell.getBoundingClientRect().right + 2)
  .map(([m, cell]) => cell.innerText.slice(0, 40))"""

# Where Tab must stop. Returns how many; what else takes the focus (a slider's number, which can be
# typed) is welcome.
STOPS = """root => {
  root.stops = [...root.querySelectorAll('button, input, select, textarea, [tabindex="0"]')]
    .filter(e => !e.disabled && e.checkVisibility({visibilityProperty: true}));
  return root.stops.length;
}"""

# The element that scrolls when the notebook does: the nearest one that holds more than it shows.
SCROLLED = """e => {
  const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowY);
  e = e.parentElement;
  while (e.parentElement && !(scrolls(e) && e.scrollHeight > e.clientHeight)) e = e.parentElement;
  return e;
}"""


def chromium() -> str | None:
    """The browser's executable: Debian's, or whatever is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def browser():
    """A headless browser; sandboxed unless root runs it, which Chromium refuses."""
    from playwright.sync_api import sync_playwright

    sandbox = getattr(os, "geteuid", lambda: 1)() != 0
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), chromium_sandbox=sandbox)
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def server(folder: Path, tmp: Path, start: tuple[str, ...] = ()):
    """``jupyter lab`` on ``folder``, without the user's settings; yields ``address(path)``.

    ``start`` goes before the command, ``tmp`` takes settings and logs.
    """
    for plugin, values in SETTINGS.items():
        file = tmp / f"config/lab/user-settings/@jupyterlab/{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    places = {"CONFIG": "config", "DATA": "data", "RUNTIME": "run"}
    environment = os.environ | {
        f"JUPYTER_{name}_DIR": str(tmp / place) for name, place in places.items()
    }
    environment |= {"IPYTHONDIR": str(tmp / "ipython"), "OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        *start,
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--ServerApp.port={port}",
    ]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]

    def address(path: str) -> str:
        return f"http://127.0.0.1:{port}/{path}?token={token}"

    with (tmp / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_until_up(address("api/status"), process, tmp / "server.log")
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the server and its kernels
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_up(address: str, process: subprocess.Popen, log: Path):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=10).close()
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"jupyter lab did not start:\n{log.read_text(errors='replace')[-2000:]}")


class Student:
    """One notebook, open in JupyterLab; ``page`` is Playwright's, for what has no method here."""

    def __init__(self, page, address, name: str):
        self.page = page
        self.address = address
        self.name = name
        self.console = []
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.set_default_timeout(MINUTES)
        page.goto(f"{address(f'lab/tree/{name}')}&reset")
        page.locator(CODE_CELL).first.wait_for()
        # The status bar names the kernel only once there is one. Before that, Run All would be lost
        # behind a dialog that asks for a kernel.
        page.get_by_text("| Idle").wait_for()

    def menu(self, *names: str):
        """Click through the menu bar."""
        # Items that open a submenu have no role, but all are list items of a menu.
        items = self.page.locator(":is([role=menubar], [role=menu]) li:visible")
        for name in names:
            label = self.page.get_by_text(name, exact=True)
            items.filter(has=label).click()

    def start(self):
        """Run > Run All Cells, without old outputs, which would look like new ones."""
        self.menu("Edit", "Clear Outputs of All Cells")
        self.page.wait_for_function(f"() => !{PROMPTS}.some(t => /\\d/.test(t))")
        self.menu("Run", "Run All Cells")
        return self

    def wait(self, minutes: float = 15):
        """Wait until all cells have run."""
        self.page.wait_for_function(DONE, timeout=minutes * MINUTES, polling=200)
        return self

    def run_code(self, code: str):
        """Paste ``code`` over the last cell, run it and wait for its end."""
        prompt, before = self.start_code(code)
        ran = "([e, old]) => /\\d/.test(e.textContent) && e.textContent !== old"
        self.page.wait_for_function(ran, arg=[prompt.element_handle(), before])

    def start_code(self, code: str):
        """Paste ``code`` over the last cell and start it; returns its prompt and what was there."""
        cell = self.page.locator(CODE_CELL).last
        cell.get_by_role("textbox").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(code)
        prompt = cell.locator(PROMPT)
        before = prompt.inner_text()
        self.page.keyboard.press("Control+Enter")
        return prompt, before

    def problems(self) -> list[str]:
        """Errors, dead widgets, cells that did not run, formulas cut off, empty pictures."""
        page = self.page
        shown = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')
        found = shown.filter(has_text="Traceback (most recent call last)").all_inner_texts()
        text = page.locator(NOTEBOOK).inner_text()
        found += [f"the page says {words!r}" for words in BROKEN if words in text]
        idle = page.evaluate(f"{PROMPTS}.filter(t => !/\\d/.test(t)).length")
        found += [f"{idle} code cells did not run"] if idle else []
        # The pictures with a web address are badges, which need a network.
        empty = "all => all.filter(i => !i.naturalWidth && !i.src.startsWith('https:')).length"
        dead = page.locator(f"{NOTEBOOK} img").evaluate_all(empty)
        cut = page.locator(f"{TEXT} mjx-container").evaluate_all(CUT)
        found += [f"a formula is cut off in the cell {start!r}" for start in cut]
        return found + ([f"{dead} pictures are empty"] if dead else []) + self.console

    def silent(self) -> int:
        """How many pictures in outputs have no alt text, for which JupyterLab writes "Image"."""
        nothing = "all => all.filter(i => ['', 'Image'].includes(i.alt)).length"
        return self.page.locator(f"{OUTPUTS} img").evaluate_all(nothing)

    def screenshot(self, path: Path):
        """Save a picture of the whole notebook, from its first cell to its last."""
        page = self.page
        before = page.viewport_size
        scrolled = page.locator(CODE_CELL).first.evaluate_handle(SCROLLED)
        height = scrolled.evaluate("e => e.scrollHeight")
        page.set_viewport_size({"width": before["width"], "height": min(height + 200, 16_000)})
        scrolled.evaluate("e => e.scrollTo(0, 0)")
        page.screenshot(path=path)
        page.set_viewport_size(before)

    def close(self):
        """Shut the notebook's kernel down and leave."""
        sessions = json.load(urllib.request.urlopen(self.address("api/sessions")))
        for session in (s for s in sessions if s["path"] == self.name):
            address = self.address(f"api/sessions/{session['id']}")
            urllib.request.urlopen(urllib.request.Request(address, method="DELETE")).close()
        self.page.close()
