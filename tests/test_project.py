"""The project's own promises: same packages everywhere, one-way imports, a light import, small
modules.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "msif_lab"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")

TOP_LEVEL = {"README.md", "LICENSE", "CONTRIBUTING.md", "pyproject.toml", "environment.yml", ".gitignore"} | {
    ".ci", "msif_lab", "notebooks", "tests", "binder",
}  # fmt: skip

# Data flow down this list; a module imports only from those above it.
ORDER = [
    *(
        "errors",
        "storage",
        "data",
        "formats",
        "sources",
        "datasets",
        "models",
        "objective",
        "checks",
        "layers",
        "operators",
        "derivatives",
        "curvature",
        "training",
        "lbfgs",
        "stages",
        "pipeline",
        "precision",
        "solvers",
        "nested",
        "krylov",
        "lissa",
        "lowrank",
        "ekfac",
    ),
    *("plan", "ranking", "influence", "sweep", "replay", "unrolled"),
    *("baselines", "validation", "comparison", "experiments", "studies", "cleaning"),
    *("marking", "exercises", "plots", "widgets"),
]

CONDA_NAME = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}
CONDA_ONLY = {"python", "pip"}
HEAVY = {"seaborn", "sklearn", "ipywidgets", "torchvision", "matplotlib", "pandas", "scipy.stats"}


# ---- Environments ----


def test_environment_matches_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = [Requirement(line) for line in project["dependencies"]]
    expected = {CONDA_NAME.get(r.name, r.name): str(r.specifier) for r in ours}

    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge"]
    assert all(isinstance(line, str) for line in environment["dependencies"]), "no pip section"
    conda = {r.name: str(r.specifier) for r in map(_conda_requirement, environment["dependencies"])}
    assert {name: bound for name, bound in conda.items() if name not in CONDA_ONLY} == expected
    assert project["requires-python"] == ">=3.11"


def _conda_requirement(line: str) -> Requirement:
    return Requirement(re.sub(r"(?<![=<>!])=(?!=)", "==", line))  # conda's single = pins a version


def test_environment_says_why_and_pins_python_for_binder():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line.startswith("  - ") and line != "  - conda-forge"]
    assert all(re.search(r" # \S", line) for line in packages), "each package states its reason"
    assert packages[0].split("#")[0].strip() == "- python=3.11"


def test_binder_folder():
    assert (ROOT / "binder/environment.yml").read_bytes() == (ROOT / "environment.yml").read_bytes()
    code = [
        line.split("  #")[0].rstrip()
        for line in (ROOT / "binder/postBuild").read_text().splitlines()
    ]
    assert [line for line in code if line and not line.startswith("#")] == [
        "set -euo pipefail",
        "python -m pip install --no-deps -e .",
        'python -c "import msif_lab"',
    ]
    assert (ROOT / "binder/start").read_text().rstrip().endswith('exec "$@"')


def test_top_level():
    tracked = _git("ls-files")
    assert tracked, "nothing is tracked yet"
    assert {path.split("/")[0] for path in tracked} == TOP_LEVEL
    assert [path for path in tracked if path.startswith(".ci/")] == [".ci/run"]
    scripts = _git("ls-files", "--stage", ".ci/run", "binder/postBuild", "binder/start")
    assert [line.split()[0] for line in scripts] == ["100755"] * 3, "scripts are executable"


def _git(*args: str) -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return _run("git", *args).splitlines()


def _run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


# ---- The package ----


def imports_below(source: str, module: str, depth: int = 1) -> list[str]:
    """The package's modules that ``module`` imports as it loads although they are not above it in
    ORDER.

    ``depth`` is 2 for a file in a folder of the package: one dot stays within the folder, two lead
        out of it.
    """
    found = []
    for node in _loaded(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name.split(".")[1] for a in node.names if a.name.startswith("msif_lab.")]
        elif isinstance(node, ast.ImportFrom):
            origin = (node.module or "").split(".")
            if (node.level == 0 and origin[0] != "msif_lab") or 0 < node.level < depth:
                continue
            inside = origin if node.level else origin[1:]
            found += [inside[0]] if inside and inside[0] else [alias.name for alias in node.names]
    above = ORDER[: ORDER.index(module)]
    return [name for name in found if name not in above]


def _loaded(node: ast.AST):
    """The nodes that run at import: not the bodies of functions, nor what only a type checker
    reads.
    """
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not lazy and not typing:
            yield child
            yield from _loaded(child)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_up(path):
    folders = path.relative_to(PACKAGE).with_suffix("").parts
    assert folders[0] in ORDER, f"{path.name} has no place in ORDER"
    assert imports_below(path.read_text(encoding="utf-8"), folders[0], depth=len(folders)) == []


@pytest.mark.parametrize(
    ("line", "below"),
    [
        ("from .errors import ShapeError", []),
        ("from msif_lab.storage import save", []),
        ("import torch\nfrom numpy import data", []),
        ("from . import models, errors", ["models"]),
        ("from .pipeline import Stage", ["pipeline"]),
        ("import msif_lab.plots", ["plots"]),
        ("from msif_lab import widgets", ["widgets"]),
        ("try:\n    from .plots import use_style\nexcept ImportError:\n    pass", ["plots"]),
        ("def draw():\n    from .plots import use_style", []),
        ("if TYPE_CHECKING:\n    from .pipeline import Stage", []),
    ],
)
def test_import_check_sees(line, below):
    assert imports_below(line, "data") == below


def test_import_check_sees_out_of_a_folder():
    lines = "from . import lesson_00\nfrom ..marking import Exercise\nfrom ..plots import use_style"
    assert imports_below(lines, "exercises", depth=2) == ["plots"]


@pytest.mark.parametrize(
    "path", [*MODULES, PACKAGE / "__init__.py"], ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_modules_stay_readable(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{path.name} has {lines} lines: split it by concept"


def test_every_folder_of_the_package_is_installed():
    """An editable install hides a folder that the wheel would lack."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]["packages"]
    folders = [p.parent.relative_to(ROOT) for p in PACKAGE.rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def test_import_is_light():
    """Under a second beyond torch's own, and none of the heavy packages."""
    code = (
        "import sys, time, torch; start = time.perf_counter(); import msif_lab;"
        "print(time.perf_counter() - start, *sys.modules)"
    )
    runs = [_run(sys.executable, "-c", code).split() for _ in range(3)]
    assert HEAVY.isdisjoint(runs[0]), sorted(HEAVY.intersection(runs[0]))
    # the best of three: other work also takes time
    assert min(float(seconds) for seconds, *_ in runs) < 1.0


def test_public_names_exist_and_are_documented():
    import msif_lab

    assert len(msif_lab.__all__) == len(set(msif_lab.__all__))
    missing = [name for name in msif_lab.__all__ if not hasattr(msif_lab, name)]
    assert not missing, f"in __all__ but absent: {missing}"
    # A dataclass without a docstring gets its signature as one; that documents nothing.
    docs = {name: getattr(msif_lab, name).__doc__ or "" for name in msif_lab.__all__}
    bare = [name for name, doc in docs.items() if not doc.strip() or doc.startswith(f"{name}(")]
    assert not bare, f"without a docstring: {bare}"


# ---- The README's figures ----


def results_row(title: str, setting: str, link: str) -> str:
    """One line of the README's table, from the results file of the setting."""
    import pandas

    table = pandas.read_csv(ROOT / f"notebooks/results/{setting}.csv").query(
        f"statistic == 'r' and link == {link!r}"
    )
    mean = table.set_index(["removals", "method"])["mean"]
    cells = [f"{mean[kind, 'unrolled']:.2f}" for kind in ("one", "2 %", "10 %")]
    others = mean["one"].drop(["unrolled", "another seed", "implicit, GGN"])
    cells += [f"{mean['10 %', 'unrolled, for groups']:.2f}", f"{mean['one', 'implicit, GGN']:.2f}"]
    cells += [f"{others.max():.2f} ({others.idxmax()})", f"{mean['one', 'another seed']:.2f}"]
    return f"| {title} | {link} | {' | '.join(cells)} |"


@pytest.mark.parametrize("link", ["frozen", "warm start"])
@pytest.mark.parametrize(
    ("title", "setting"),
    [
        ("MNIST 0–3 → 4–9", "mnist"),
        ("MNIST → other digits", "mnist_to_digits"),
        ("CIFAR-10 bird/frog → automobile/deer", "cifar"),
        ("CIFAR-10 animals → vehicles", "cifar_vehicles"),
    ],
)
def test_readme_shows_what_the_results_files_say(title, setting, link):
    assert (
        results_row(title, setting, link)
        in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    )
