"""bergson's approximate unrolling (SOURCE) compared with SegmentedInfluence on one training stage.

    python tests/benchmarks/peers/run_bergson.py [--seeds 2] [--lr 0.1] [--out DIR]
    python tests/benchmarks/peers/run_bergson.py --bergson ENV/bin/python     where you have it

Needs transformers beside msif_lab. bergson runs in an environment of its own, made in DIR with pip
the first time; a seed takes about 20 minutes, one thread. A Llama of 2 layers learns 200 pieces of
32 characters (Python's own help texts) by plain SGD with momentum 0.9 in a plain loop, 12 epochs,
float32, with 12 checkpoints as Hugging Face folders. Only the weights of linear layers inside the
blocks are trained: those are all that bergson attributes to.

Truth: for 40 single removals the loop runs again, the example in its place with weight 0. r is
Pearson's between predicted and real changes of a query's loss, mean over 10 queries. Seconds are
wall time without imports, after a first small run.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy
import torch

PINNED = "bergson==2.5.1"
EXAMPLES, QUERIES, REMOVALS, LENGTH = 200, 10, 40, 32
EPOCHS, BATCH, CHECKPOINTS, MOMENTUM = 12, 20, 12, 0.9
STEPS = EPOCHS * EXAMPLES // BATCH
SEGMENTS = (3, 6, 12)


# ---- The run: data, model, plain loop ----


def texts(seed: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Training pieces and, from other chapters, queries ``(n, LENGTH)``; and the characters."""
    from pydoc_data.topics import topics

    text = re.sub(r"\s+", " ", " ".join(topics[key] for key in sorted(topics)).lower())
    text = re.sub(r"[^ -~]", "", text)
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    pieces = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for some, n in zip(pieces.split(-(-len(pieces) // 2)), (EXAMPLES, QUERIES), strict=True):
        parts.append(some[torch.randperm(len(some), generator=draw)[:n]])
    return *parts, characters


def model(seed: int, characters: list[str]):
    """A small Llama, which has no biases, with all but its blocks' linear layers frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=2048,  # bergson's batches may hold no more tokens than this
        initializer_range=0.15,  # the frozen output layer must reach all characters
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    net = LlamaForCausalLM(config).eval()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("_proj." in name)  # bergson leaves lm_head out too
    return net


def losses(net, tokens: torch.Tensor) -> torch.Tensor:
    import msif_lab as msif

    return msif.next_token_loss(net(tokens).logits, tokens)


def loop(net, tokens, seed: int, lr: float, keep, removed=()):
    """A plain loop; calls ``keep(step)`` at the start and after each part of the run.

    Returns the learning rates and the optimiser. A removed example keeps its place and counts for
    nothing.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    weights = torch.ones(len(tokens))
    weights[list(removed)] = 0
    order, rates = torch.Generator().manual_seed(seed), []
    keep(0)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(tokens), generator=order).split(BATCH):
            optimizer.zero_grad()
            (weights[batch] * losses(net, tokens[batch])).mean().backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
            if len(rates) % (STEPS // CHECKPOINTS) == 0:
                keep(len(rates))
    return rates, optimizer


def effects(seed: int, lr: float, tokens, queries, characters, removed) -> torch.Tensor:
    """Real changes of each query's loss by each removal ``(queries, removals)``."""
    rows = []
    for group in ([], *([i] for i in removed)):
        net = model(seed, characters)
        loop(net, tokens, seed, lr, lambda step: None, group)
        with torch.no_grad():
            rows.append(losses(net, queries))
    return torch.stack([row - rows[0] for row in rows[1:]], 1)


# ---- Ours ----


def our_rows(net, tokens, queries, run) -> list[dict]:
    """Scores and seconds of each of our methods, from the same checkpoints."""
    import msif_lab as msif

    def scored(method, asked):
        start = time.perf_counter()
        wrapped = msif.wrap(net, call=lambda m, x: m(x).logits)
        data = msif.Examples(tokens, tokens)
        stage = msif.Stage("only", wrapped, data, loss=msif.next_token_loss)
        method.fit(msif.Pipeline([stage]).adopt(checkpoints=[run]))
        scores = method.score(msif.Examples(asked, asked)).values
        return scores, time.perf_counter() - start

    source = {"curvature": "ggn", "dynamics": "flow", "details": False}
    methods = {("msif_lab", n): msif.SegmentedInfluence(n) for n in SEGMENTS}
    methods["msif_lab, krylov=6", 12] = msif.SegmentedInfluence(12, krylov=6)
    for n in SEGMENTS:
        methods["msif_lab, its SOURCE form", n] = msif.SegmentedInfluence(n, **source)
    methods["msif_lab, TracIn", CHECKPOINTS] = msif.TracIn(CHECKPOINTS)
    scored(msif.SegmentedInfluence(12, krylov=1), queries[:1])  # what is done once
    rows = []
    for (name, n), method in methods.items():
        scores, seconds = scored(method, queries)
        rows.append({"method": name, "segments": n, "seconds": seconds, "scores": scores})
    return rows


# ---- bergson ----


def write_job(folder: pathlib.Path, tokens, queries, characters, rates) -> None:
    """What bergson reads besides the checkpoints: tokens, a tokenizer, the rates of the steps."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for name, some in (("train", tokens), ("queries", queries)):
        lines = [json.dumps({"input_ids": row}) for row in some.tolist()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    words = models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=characters[0])
    # never used, for the tokens are there, but always loaded
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder / "tokenizer")
    (folder / "rates.json").write_text(json.dumps(rates))


def bergson_scores(folder: pathlib.Path, segments: int, labels: bool, checkpoints: list[int]):
    """Run ``bergson approxunrolling`` as its command line does; scores and seconds.

    Its losses and curvature are those of a piece's mean loss, as in training, not the sum that is
    its default.
    """
    from bergson.cli.commands import ApproxUnrolling
    from bergson.config import ApproxUnrollingConfig, HessianConfig, IndexConfig
    from bergson.config.config import DataConfig, QuerySetConfig
    from bergson.data import load_scores_loss_signed

    rates = numpy.array(json.loads((folder / "rates.json").read_text())).reshape(segments, -1)
    run = folder / f"bergson-{segments}-{len(checkpoints)}-{labels}"
    torch.manual_seed(0)  # for the labels that it draws from the model
    start = time.perf_counter()
    ApproxUnrolling(
        IndexConfig(
            str(run),
            overwrite=True,
            model=str(folder / f"checkpoint-{checkpoints[-1]}"),
            tokenizer=str(folder / "tokenizer"),
            precision="fp32",
            data=DataConfig(dataset=str(folder / "train.jsonl")),
            loss_reduction="mean",
        ),
        HessianConfig("kfac", ev_correction=True, use_dataset_labels=labels),
        ApproxUnrollingConfig(
            checkpoints=[str(folder / f"checkpoint-{step}") for step in checkpoints],
            segments=segments,
            lr_list=rates.mean(1).tolist(),
            step_size_list=[rates.shape[1]] * segments,
            momentum=MOMENTUM,
            query=QuerySetConfig(dataset=str(folder / "queries.jsonl"), aggregation="none"),
        ),
    ).execute()
    # like our scores, positive where an example raises the query's loss
    scores = load_scores_loss_signed(str(run / "scores"))[0].T
    return scores, time.perf_counter() - start


def serve(folder: pathlib.Path) -> None:
    """In bergson's environment: all of its rows, as JSON."""
    every = [(c + 1) * STEPS // CHECKPOINTS for c in range(CHECKPOINTS)]
    bergson_scores(folder, 1, False, every[-1:])  # what is done once
    rows = []
    for labels in (False, True):
        name = "bergson" + ", labels of the data" * labels
        for n in SEGMENTS:
            scores, seconds = bergson_scores(folder, n, labels, every)
            row = {"method": name, "segments": n, "seconds": seconds, "scores": scores.tolist()}
            rows.append(row)
    (folder / "bergson.json").write_text(json.dumps(rows))


def bergson_rows(python: str, folder: pathlib.Path) -> list[dict]:
    """`serve` in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    env |= {"HF_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "bergson.log", "w") as log:
        command = [python, __file__, "--serve", folder]
        done = subprocess.run(command, stdout=log, stderr=log, env=env)
    if done.returncode:
        raise SystemExit(f"bergson failed, see {folder / 'bergson.log'}")
    rows = json.loads((folder / "bergson.json").read_text())
    return [row | {"scores": torch.tensor(row["scores"])} for row in rows]


# ---- Both ----


def one_seed(seed: int, lr: float, python: str, folder: pathlib.Path) -> list[dict]:
    """Train, remove for real, score by all methods; rows with r."""
    import transformers

    import msif_lab as msif

    transformers.utils.logging.disable_progress_bar()  # one for each checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    tokens, queries, characters = texts(seed)
    net, saved = model(seed, characters), []

    def keep(step):
        saved.append((step, {k: v.clone() for k, v in net.state_dict().items()}))
        net.save_pretrained(folder / f"checkpoint-{step}")

    with torch.no_grad():
        before = losses(net, tokens).mean()
    rates, optimizer = loop(net, tokens, seed, lr, keep)
    with torch.no_grad():
        after = [losses(net, some).mean() for some in (tokens, queries)]
    write_job(folder, tokens, queries, characters, rates)
    removed = [g[0] for g in msif.random_removals(EXAMPLES, REMOVALS, seed=seed)]
    start = time.perf_counter()
    real = effects(seed, lr, tokens, queries, characters, removed)
    print(
        f"\nseed {seed}: loss {before:.2f} to {after[0]:.2f}, queries {after[1]:.2f}; a removal "
        f"changes a query's by {real.abs().mean():.1e}; {time.perf_counter() - start:.0f} s"
    )
    rows = our_rows(net, tokens, queries, msif.Run(saved, rates, optimizer))
    rows += bergson_rows(python, folder)
    scores = {f"{row['method']} {row['segments']}": row["scores"].numpy() for row in rows}
    numpy.savez(folder / "scores.npz", removed=removed, real=real.numpy(), **scores)
    for row in rows:
        predicted = -row.pop("scores")[:, removed]
        pairs = zip(predicted, real, strict=True)
        found = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
        row["r"] = sum(found) / len(found)
        print(f"{row['method']:<28} {row['segments']:>3} {row['r']:>6.3f} {row['seconds']:>6.1f} s")
    return rows


def main(args) -> None:
    torch.set_num_threads(1)
    python = args.bergson
    with contextlib.ExitStack() as stack:
        out = args.out or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if python is None:
            sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
            import bench_peers

            bench_peers.PINNED["bergson"] = PINNED
            python, reason = bench_peers.environment("bergson", out)
            if python is None:
                raise SystemExit(f"bergson is {reason}")
        seeds = [one_seed(s, args.lr, python, out / f"seed-{s}") for s in range(args.seeds)]
        print(f"\nmean of {args.seeds} seeds, lr {args.lr}")
        print(f"{'method':<28} {'segments':>8} {'r':>6} {'seconds':>8}")
        for rows in zip(*seeds, strict=True):
            r, seconds = (sum(row[key] for row in rows) / len(rows) for key in ("r", "seconds"))
            print(f"{rows[0]['method']:<28} {rows[0]['segments']:>8} {r:>6.3f} {seconds:>8.1f}")
        if args.out:
            (out / "rows.json").write_text(json.dumps(seeds, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.1, help="first learning rate; it falls to 0")
    parser.add_argument("--bergson", help=f"python of an environment with {PINNED}")
    parser.add_argument("--out", type=pathlib.Path, help="keep checkpoints, logs and rows here")
    parser.add_argument("--serve", type=pathlib.Path, help="what it calls itself with")
    given = parser.parse_args()
    if given.serve:
        torch.set_num_threads(1)
        serve(given.serve)
    else:
        main(given)
