"""ImplicitInfluence compared with other libraries, each in its own environment.

    python tests/benchmarks/bench_peers.py --jobs S --peers ours --quick       a minute
    python tests/benchmarks/bench_peers.py --work ~/peers                      everything, an hour
    python tests/benchmarks/bench_peers.py --jobs D --peers ours pydvl --threads 2 --out d.json

Jobs: S softmax regression, 788 parameters, MNIST 2,000 × 20 queries, Hessian + 1e-2; M tanh conv
net, 26,698 parameters, MNIST 10,000 × 20 queries, GGN + 1e-2, relative residual 1e-3; D is M's net
on 2,000 examples, Hessian + 0.2.

Costs are multiples of a plain forward and backward epoch over the job's data (batches of 250), the
median of epochs timed in the worker's own process just before and after the job; what a process
does once (lazy imports) is paid before, in a run on 60 examples, and given as "first". All seconds
are CPU seconds of the process: with one thread the same as wall time on an idle machine, and still
right on a busy one. Memory is the process's VmHWM over the job, and the part of it that was added
to imports and data. Errors are against `peers/run_reference.py`, plain PyTorch: max |s − s*| / max
|s*| and the median over queries of Pearson's r. The environments reuse this one's PyTorch through a
.pth file.

The reference covers D's and M's first queries only (it solves them one column at a time).
Approximations are compared on all 20 queries: "r all" is the correlation with the scores of our
fastest solver that agrees with the reference.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import time

import numpy
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))
import job as jobs  # noqa: E402  (the workers import it by this name)

PINNED = {
    "ours": None,
    "pydvl": "pyDVL[influence]==0.10.0",
    "dattri": "dattri==0.3.0",
    "captum": "captum==0.9.0",
    "kronfluence": "kronfluence==1.0.1",
}
# Named in the table, not run: pip cannot get it from a package index, so this script could not
# repeat the run elsewhere.
NOT_RUN = {"torch-influence": "not on PyPI; its README installs from a git checkout"}
VARIANTS = {
    ("S", "ours"): ["exact", "cg"],
    ("S", "pydvl"): ["direct", "block-cg"],
    ("S", "dattri"): ["explicit"],
    ("S", "captum"): ["naive"],
    ("S", "kronfluence"): ["ekfac"],
    ("D", "ours"): ["cg-nested", "cg-lowrank", "cg", "cg-ekfac"],
    ("D", "pydvl"): ["block-cg", "block-cg-nystrom"],
    ("D", "dattri"): ["cg"],
    ("D", "captum"): ["arnoldi"],
    ("M", "ours"): ["cg", "cg-lowrank", "cg-ekfac", "lowrank", "ekfac"],
    ("M", "kronfluence"): ["ekfac"],
    ("M", "pydvl"): ["ekfac"],
}
MOST = {"D": 165, "M": 600}  # epochs
CORRECT = 1e-2  # largest error of a method that claims to solve the system


def write_data(work: pathlib.Path) -> None:
    """The jobs' images and labels as safetensors, once."""
    import msif_lab as msif

    for net, pool, classes in (("softmax", 2, range(4)), ("conv", 1, range(10))):
        path = work / f"{net}-data.safetensors"
        if not path.exists():
            train, test = msif.load_mnist(pool=pool, classes=tuple(classes))
            train, test = train.select(n=jobs.TRAINED_ON[net], seed=0), test.select(n=20, seed=0)
            # Shuffled: `select` orders by position, and D is the first part of M
            save_file(
                {
                    "x": train.x.clone(),
                    "y": train.y.clone(),
                    "qx": test.x.clone(),
                    "qy": test.y.clone(),
                },
                path,
            )


def environment(peer: str, work: pathlib.Path) -> tuple[str | None, str]:
    """``(python, "")`` of the peer's own environment, else ``(None, reason)`` of pip's refusal."""
    if PINNED[peer] is None:
        return sys.executable, ""
    folder = work / "envs" / peer
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists() or done.read_text() != PINNED[peer]:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        (site,) = folder.glob("lib/python3*/site-packages")
        # the installed torch: 6 GB that need not come once per peer
        ours = sysconfig.get_paths()["purelib"]
        (site / "_ours.pth").write_text(ours + "\n")
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        made = subprocess.run([*command, PINNED[peer]], capture_output=True, text=True, timeout=900)
        if made.returncode:
            errors = [line for line in made.stderr.splitlines() if line.startswith("ERROR")]
            return None, "not installed: " + (errors[-1] if errors else made.stderr.strip()[-200:])
        done.write_text(PINNED[peer])
    return str(python), ""


def usage(pid: int) -> tuple[float, float]:
    """A process's memory now, in GB, and the CPU seconds it has used."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        times = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    except OSError:  # it has just ended
        return 0.0, 0.0
    memory = next(
        (int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmRSS")), 0.0
    )
    return memory, sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def run_worker(python, script, args, name, variant, seconds, out) -> tuple[dict | None, str]:
    """One job in a process of its own, stopped when it exceeds its time or memory.

    Returns ``(facts, "")`` or ``(None, reason)``.
    """
    repository = str(HERE.parent.parent)
    env = os.environ | {
        "PYTHONPATH": repository if script == "ours" else "",
        "OMP_NUM_THREADS": str(args.threads),
    }
    command = [python, HERE / "peers" / f"run_{script}.py", args.work, name, variant, out]
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(
            [*command, "--threads", str(args.threads)], stdout=log, stderr=log, env=env
        )
        reason = ""
        while process.poll() is None:
            time.sleep(0.1)
            memory, used = usage(process.pid)
            if used > seconds:
                reason = f"stopped after {seconds:.0f} CPU seconds"
            elif memory > args.memory:
                reason = f"stopped at {args.memory} GB"
            if reason:
                process.kill()
                process.wait()
                return None, reason
    if process.returncode:
        lines = pathlib.Path(f"{out}.log").read_text().strip().splitlines()
        return None, f"exit {process.returncode}: {lines[-1] if lines else ''}"[:160]
    return json.loads(pathlib.Path(f"{out}.json").read_text()), ""


def agreement(scores: numpy.ndarray, truth: numpy.ndarray) -> tuple[float, float]:
    """Largest error over the largest score, and the median per-query Pearson correlation."""
    scores = scores[: len(truth)]
    r = [numpy.corrcoef(a, b)[0, 1] for a, b in zip(scores, truth, strict=True)]
    return float(abs(scores - truth).max() / abs(truth).max()), float(numpy.median(r))


def compare_all_queries(rows: list[dict], scores: list[numpy.ndarray]) -> None:
    """Give each row of a job ``"r all"``, over all queries.

    It is the correlation with our fastest solver that the reference confirms.
    """
    correct = [i for i, r in enumerate(rows) if r["library"] == "ours" and r["error"] < CORRECT]
    if correct:
        solved = scores[min(correct, key=lambda i: rows[i]["epochs"])]
        for row, found in zip(rows, scores, strict=True):
            row["r all"] = agreement(found, solved)[1]


def reference(name: str, args) -> tuple[numpy.ndarray | None, str]:
    """The independent scores of the job's first queries, kept in the work folder."""
    path = args.work / f"{name}-reference"
    if not path.with_suffix(".npy").exists():
        facts, reason = run_worker(
            sys.executable, "reference", args, name, "-", args.timeout * 3, str(path)
        )
        if facts is None:
            return None, f"no reference: {reason}"
    facts = json.loads(path.with_suffix(".json").read_text())
    note = f"reference: {facts['seconds'] / facts['epoch']:.0f} epochs {facts['note']}"
    return numpy.load(path.with_suffix(".npy")).astype(float), note


def verdict(holds: bool) -> str:
    return "holds" if holds else "FALLS SHORT"


def verdicts(rows: list[dict]) -> list[str]:
    """One line for each goal: whether these rows reach it."""
    done = [r for r in rows if "failed" not in r]
    ours, peers = ([r for r in done if (r["library"] == "ours") == mine] for mine in (True, False))
    lines = []

    def best(some, job):
        return min(
            (r for r in some if r["job"] == job and r["error"] < CORRECT),
            key=lambda r: r["epochs"],
            default=None,
        )

    for job in dict.fromkeys(r["job"] for r in ours):
        mine, other = best(ours, job), best(peers, job)
        if mine is None:
            lines.append(f"{job}: FALLS SHORT, no solver of ours within {CORRECT} of the reference")
            continue
        line = f"{job}: {mine['variant']} {mine['epochs']:.0f} epochs"
        if job in MOST:
            line += f", at most {MOST[job]} asked: {verdict(mine['epochs'] <= MOST[job])}"
        if other is not None:
            ratio = other["epochs"] / mine["epochs"]
            line += f"; fastest correct peer {other['library']} {other['variant']} "
            line += f"{other['epochs']:.0f}, {ratio:.1f}×"
            if job not in MOST:
                line += f", at least 2× asked: {verdict(ratio >= 2)}"
        lines.append(line)
    for r in ours:
        for other in [p for p in peers if (p["job"], p["library"]) == (r["job"], "kronfluence")]:
            if r["variant"] in ("ekfac", "lowrank"):
                which = "r all" if "r all" in r else "r"
                good = r["epochs"] <= other["epochs"] and r[which] >= other[which]
                line = f"{r['job']}: {r['variant']} {r['epochs']:.1f} epochs, "
                line += f"{which} {r[which]:.3f}; kronfluence {other['epochs']:.1f}, "
                line += f"{other[which]:.3f}: {verdict(good)}"
                lines.append(line)
    if ours:
        most = max(r["peak"] for r in ours)
        lines.append(f"memory: at most {most:.0f} MB, 1,000 asked: {verdict(most < 1000)}")
    return lines


def main(args) -> None:
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    write_data(args.work)
    rows = []
    pythons = {peer: environment(peer, args.work) for peer in args.peers if peer in PINNED}
    form = "{:<3} {:<16} {:<17} {:>8} {:>8} {:>6} {:>6} {:>6} {:>8} {:>7}  {}"
    for name in args.jobs:
        job = jobs.load(args.work, name)
        truth, note = (
            (None, "no reference asked for") if args.no_reference else reference(name, args)
        )
        epoch = min(job.epochs())
        spec = job.spec
        print(
            f"\n{name}: {spec.net}, {job.parameters:,} parameters, {len(job.x):,} examples × "
            f"{len(job.qx)} queries, {spec.curvature} + {spec.damping}; plain epoch {epoch:.3f} s, "
            f"{args.threads} thread(s); {note}"
        )
        columns = ("epochs", "seconds", "first", "MB", "added", "max err", "r", "")
        print(form.format("job", "library", "variant", *columns), flush=True)
        found = []  # the scores of the rows that are done
        for peer in args.peers:
            if peer in NOT_RUN:
                print(form.format(name, peer, "-", *"-------", NOT_RUN[peer]))
                rows.append({"job": name, "library": peer, "variant": "-", "failed": NOT_RUN[peer]})
                continue
            python, reason = pythons[peer]
            variants = VARIANTS.get((name, peer), [])
            for variant in variants[:1] if args.quick else variants:
                row = {"job": name, "library": peer, "variant": variant}
                if python is None:
                    facts = None
                else:
                    allowed = min(args.timeout, args.limit_epochs * epoch + 60)
                    with tempfile.TemporaryDirectory() as folder:
                        out = f"{folder}/out"
                        facts, reason = run_worker(
                            python, peer.replace("-", "_"), args, name, variant, allowed, out
                        )
                        scores = None if facts is None else numpy.load(f"{out}.npy").astype(float)
                if facts is None:
                    print(form.format(name, peer, variant, *"-------", reason), flush=True)
                    rows.append(row | {"failed": reason})
                    continue
                error, r = (float("nan"),) * 2 if truth is None else agreement(scores, truth)
                epochs = facts["seconds"] / facts["epoch"]
                rows.append(row | facts | {"epochs": epochs, "error": error, "r": r})
                found.append(scores)
                cells = [f"{epochs:.1f}", f"{facts['seconds']:.2f}", f"{facts['first']:.1f}"]
                cells += [f"{facts['peak']:.0f}", f"{facts['added']:.0f}"]
                drift = (
                    ""
                    if 0.8 < facts["drift"] < 1.25
                    else f"[epochs drifted ×{facts['drift']:.2f}] "
                )
                print(
                    form.format(
                        name,
                        peer,
                        variant,
                        *cells,
                        f"{error:.1e}",
                        f"{r:.4f}",
                        drift + facts["note"],
                    )
                )
                sys.stdout.flush()
        compare_all_queries([r for r in rows if r["job"] == name and "failed" not in r], found)
    print("\n" + "\n".join(verdicts(rows)))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", default=["S", "D", "M"], choices=list(jobs.SPECS))
    parser.add_argument(
        "--peers", nargs="+", default=[*PINNED, *NOT_RUN], choices=[*PINNED, *NOT_RUN]
    )
    cache = pathlib.Path(tempfile.gettempdir()) / "msif_peers"
    parser.add_argument(
        "--work", type=pathlib.Path, default=cache, help=f"environments, data, references; {cache}"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--timeout", type=float, default=900, help="CPU seconds for one job of one library"
    )
    parser.add_argument("--limit-epochs", type=float, default=1500, help="the same in plain epochs")
    parser.add_argument("--memory", type=float, default=14, help="GB for one job of one library")
    parser.add_argument(
        "--no-reference",
        action="store_true",
        help="costs only; M's reference takes hundreds of epochs",
    )
    parser.add_argument("--quick", action="store_true", help="only each library's first variant")
    parser.add_argument("--out", type=pathlib.Path, help="write the rows as JSON")
    main(parser.parse_args())
