"""What mybinder.org will build and start, as far as it can be seen without building an image."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from pathlib import Path
from urllib.parse import urlparse

import lab
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="Binder runs Linux; these are shell scripts"
)


def run(*command, cwd=ROOT, **environment) -> str:
    environment = os.environ | environment
    for developers in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(developers, None)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(
    not importlib.util.find_spec("repo2docker"), reason='no repo2docker; pip install -e ".[test]"'
)
def test_repo2docker_picks_our_files():
    said = run(sys.executable, "-m", "repo2docker", "--no-build", "--debug", ".")
    assert "Building conda environment for python=3.11\n" in said
    commands = [line for line in said.splitlines() if not line.startswith("#")]
    order = [
        "COPY --chown=0:0 src/binder/environment.yml ${REPO_DIR}/binder/environment.yml",
        "bash -c 'time ${MAMBA_EXE} env update -p ${NB_PYTHON_PREFIX} "
        '--file "binder/environment.yml" && \\',
        # After the environment, which thus stays cached when only our code changes.
        "COPY --chown=0:0 src/ ${REPO_DIR}/",
        "RUN ./binder/postBuild",
        'ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"',
    ]
    assert [line for line in commands if line in order] == order


def test_post_build_installs_the_checkout(tmp_path):
    """In a fresh environment with all packages, which conda has installed before postBuild runs."""
    copy = shutil.copytree(
        ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")
    )
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Python does not read the .pth files of a folder that is added so: this environment's own,
    # editable msif_lab cannot be found by mistake.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    find = (
        "import importlib.util as i; print(i.find_spec('torch') is None, i.find_spec('msif_lab'))"
    )
    assert run(python, "-c", find, cwd=tmp_path).split() == ["False", "None"]
    run("binder/postBuild", cwd=copy, PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    where = run(python, "-c", "import msif_lab; print(msif_lab.__file__)", cwd=tmp_path).strip()
    assert Path(where).resolve() == (copy / "msif_lab/__init__.py").resolve()


@pytest.mark.parametrize(("given", "threads"), [({}, "2"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_start_caps_threads(given, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    seen = json.loads(run("binder/start", sys.executable, "-c", show, **given))
    assert {seen[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {threads}


def test_lab_opens_on_the_index(tmp_path):
    with (
        lab.server(ROOT, tmp_path, start=(str(ROOT / "binder/start"),)) as address,
        urllib.request.urlopen(address("")) as page,
    ):
        path = urlparse(page.url).path
    assert path == "/lab/tree/notebooks/index.ipynb"
    assert f"?urlpath={path[1:]})" in (ROOT / "README.md").read_text(encoding="utf-8")
