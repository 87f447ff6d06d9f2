"""Makes two tables: what each stage of the method does, and what each part of its training is worth.

    python -m lab.ablation --lr lr/ --hr hr/ --tags tags.csv                         # stages of the bundled model
    python -m lab.ablation --lr lr/ --hr hr/ --tags tags.csv --data ./hq --steps 300 \\
        --train-args "--rank 16 --lr 2e-4"                                               # and the ablations
    python -m lab.ablation … --only method no-align --limit 10                       # some rows, ten pairs

Stages: one model, cut open. D(E(x_H)) is the ceiling, since all results pass the decoder; D(E(x_L)) shows what the
autoencoder does by itself; what the update adds is the prior's without the adapter, and the method's with it.
Ablations: adapters trained by train.py from nothing, with the paper's losses, each with one thing changed, and
evaluated with the τ and the suffix that it was trained with. --seeds 0 1 trains each twice. A last table has what
each changes: PSNR, LPIPS and DISTS minus the method's, means over the seeds, with the 95 % interval over the pictures,
apart for each kind of pictures whose names end in _KIND. It has the method's own seeds, too, one minus the other: a
change as small as that means nothing.

Needs pairs of photos with matching names (RealSR's layout), and for the ablations a folder of photos. Every row is
eval.py's, one CSV image by image. --out keeps stages/NAME.csv, ablations/NAME-SEED.csv and NAME-SEED/ (the run), and
stages.csv, ablations.csv (the tables). Rows that have their CSV are not made again; after Ctrl-C, rerun to resume. A
row of 128² pairs takes 4 s of CPU time a pair, most of it the metrics, and an ablation its steps besides.
"""
import copy
import csv
import json
import os
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import ImageFilter
from tqdm import tqdm

import metrics
import runs
import weights
from fast import load_model
from lab import stages
from lab.stages import Stage
from metrics.score import evaluate, folder_pairs, load_all, pick, shown, write_scores
from photos.kinds import KINDS
from photos.pairs import find_tags
from photos.pictures import bicubic, write_bytes
from runs import UserError, pick_device, pick_dtype, write_csv
from sanasr import conditioning
from weights.files import fingerprint, open_weights

STAGES = {
    "bicubic": "bicubic enlargement, x_L",
    "unsharp": "x_L with an unsharp mask (σ 1.5, amount 3)",
    "ceiling": "D(E(x_H)), the ceiling",
    "autoencoder": "D(E(x_L)), no update",
    "prior": "the prior's update, no adapter",
    "full": "the method",
    "full-tags": "the method with tags",
    "full-no-suffix": "the method without suffix",
}
VARIANTS = {  # name: (what, options of train.py)
    "method": ("the method (τ 900, HQ protocol)", []),
    "no-align": ("without L_align", ["--no-align"]),
    "no-cons": ("without L_cons", ["--no-cons"]),
    "no-lpips": ("without LPIPS", ["--no-lpips"]),
    "tau-600": ("τ 600", ["--timestep", "600"]),
    "tau-999": ("τ 999", ["--timestep", "999"]),
    "lq": ("LQ protocol (τ 999, t 20 to 980)", ["--protocol", "lq"]),
    "no-suffix": ("without suffix", ["--suffix", "none"]),
    "tags": ("with tags", ["--tags", "FILE"]),  # FILE: --tags
    "attn+ffn": ("LoRA on attention and FFN", ["--lora-targets", "attn+ffn"]),
    "rank-16": ("rank 16", ["--rank", "16"]),
    "own": ("the losses of the model's provenance.json", []),
}

# in the place of a model: x_L, and x_L + 3 (x_L − blurred x_L), the filter that a trained model must beat
BICUBIC = SimpleNamespace(restore=lambda image, prompt, scale: bicubic(image, scale))
UNSHARP = SimpleNamespace(restore=lambda image, prompt, scale: bicubic(image, scale).filter(
    ImageFilter.UnsharpMask(1.5, percent=300, threshold=0)))


def without_update(model):
    """The SanaSR with z_L in the place of ẑ: it restores a picture to D(E(x_L))."""
    model = copy.copy(model)
    model.dit = lambda z, t, c, m: torch.zeros_like(z)
    return model


def score(model, pairs, path, args, tags=None, **options):
    """Restore and score `pairs` with `model`, and write the rows to `path`. tags: a file, or None for no tags."""
    prompts = find_tags(tags or "none", [pair.name for pair in pairs], None)
    write_scores(evaluate(model, pairs, args.metrics, device=args.device, prompts=prompts, **options,
                          progress=lambda x: tqdm(x, path.stem, unit="img", leave=False, disable=None)), path)


def restorer(args, adapter):
    """The model as eval.py restores with it."""
    return load_model(args.model, args.device, pick_dtype("auto", args.device), adapter, "auto")


def stage(name, args, model, path):
    """Make one row of the table of stages."""
    if simple := {"bicubic": BICUBIC, "unsharp": UNSHARP, "autoencoder": without_update(model)}.get(name):
        return score(simple, args.pairs, path, args)
    if name == "ceiling":
        return score(without_update(model), [replace(pair, lr=pair.hr) for pair in args.pairs], path, args, scale=1)
    score(restorer(args, "none" if name == "prior" else args.adapter), args.pairs, path, args,
          args.tags if name == "full-tags" else None, timestep=model.timestep,
          suffix="none" if name == "full-no-suffix" else conditioning(model.metadata)["suffix"])


def variant(name, seed, args, path):
    """Make one row of the table of ablations: train an adapter, or go on with it, and evaluate it."""
    folder, source, plain = path.with_suffix("").resolve(), weights.folder(args.model).resolve(), args.out / "plain"
    if not plain.exists():  # the same networks: without provenance.json train.py takes the paper's losses
        shutil.copytree(source, plain, copy_function=os.symlink, ignore=shutil.ignore_patterns(
            "provenance.json", "adapter.safetensors"))
    options = [args.tags if option == "FILE" else option for option in VARIANTS[name][1]]
    line = ["train", "--data", *args.data, "--model", args.model if name == "own" else plain.resolve(),
            "--init", "none", "--tags", "none", "--steps", args.steps, "--name", folder, "--seed", seed,
            "--device", args.device.type, *shlex.split(args.train_args)]
    with open(f"{folder}.log", "a", encoding="utf-8") as log, redirect_stdout(log):
        stages.run([Stage(name, [*line, *options], resume=folder / "state.pt")])
    adapter = folder / "adapter.safetensors"
    with open_weights(adapter) as file:
        trained = file.metadata()
    score(restorer(args, adapter), args.pairs, path, args, args.tags if trained["tags"] == "file" else None)


def read_scores(path):
    """{picture, or "mean": {metric: text}} of what `score` wrote."""
    with open(path, newline="", encoding="utf-8") as f:
        return {row.pop("image"): row for row in csv.DictReader(f)}


def scores(folder, names):
    """{picture: {metric: mean over the rows of these names}}, {} where one is lacking."""
    paths = [folder / f"{name}.csv" for name in names]
    tables = [read_scores(path) for path in paths] if all(path.exists() for path in paths) else [{}]
    return {image: {metric: np.mean([float(table[image][metric]) for table in tables]) for metric in row}
            for image, row in tables[0].items() if image != "mean"}


def markdown(head, rows):
    """A table of texts as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def differences(out, seeds, measures):
    """The table of what each ablation changes, as Markdown; see the module's docstring."""
    ablations, method = out / "ablations", [f"method-{seed}" for seed in seeds]
    rows = {"D(E(x_L)), no update": (scores(out / "stages", ["autoencoder"]), scores(ablations, method))}
    rows |= {what: (scores(ablations, [f"{name}-{seed}" for seed in seeds]), scores(ablations, method))
             for name, (what, _) in VARIANTS.items() if name != "method"}
    if len(seeds) > 1:
        rows[f"the method, seed {seeds[-1]} minus seed {seeds[0]}"] = (
            scores(ablations, method[-1:]), scores(ablations, method[:1]))
    rows = {what: pair for what, pair in rows.items() if all(pair)}
    kinds = sorted({kind_of(image) for a, _ in rows.values() for image in a})
    lines = []
    for what, (a, b) in rows.items():
        cells = [[a[i][m] - b[i][m] for i in a if i in b and kind_of(i) == kind] for kind in kinds for m in measures]
        lines.append([what, *("{:+.4f} [{:+.4f}, {:+.4f}]".format(np.mean(x), *bootstrap(x)) for x in cells)])
    head = ["minus the method", *(f"{kind} {m.upper()}".strip() for kind in kinds for m in measures)]
    return markdown(head, lines) if rows else ""


def kind_of(image):
    return next((kind for kind in KINDS if Path(image).stem.endswith(f"_{kind}")), "")


def open_pairs(args):
    """Make of --lr and --hr args.pairs, of --metrics those whose weights are available. Returns them as settings."""
    args.pairs = folder_pairs(args.lr, args.hr)[:args.limit]
    args.metrics = list(load_all(pick(args.metrics, True), args.device))
    return {"lr": Path(args.lr).resolve(), "hr": Path(args.hr).resolve(), "pairs": len(args.pairs),
            "metrics": ",".join(args.metrics), "tags": args.tags and weights.sha256(Path(args.tags))}


def keep_settings(folder, settings):
    """Rows of one table are made alike. Raises UserError where those in `folder` were made with other settings."""
    path = folder / "settings.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    settings = {k: str(v) for k, v in settings.items() if v is not None}
    if changed := [k for k, v in settings.items() if old.get(k, v) != v]:
        raise UserError(f"{folder} holds rows that were made with another {', '.join(changed)}: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json.dumps(old | settings, indent=1))


def tabulate(folder, words, costs):
    """Write the mean rows found in `folder`, in the order of `words`, to folder.csv; returns them as Markdown.

    words: {name: what}; costs: {name: {column: text}}, columns that are no metrics.
    """
    rows = [{"name": name, "what": what} | read_scores(path)["mean"] | costs.get(name, {})
            for name, what in words.items() if (path := folder / f"{name}.csv").exists()]
    columns = [m for m in metrics.METRICS if any(m in row for row in rows)]
    extra = list(dict.fromkeys(column for name in words for column in costs.get(name, {})))
    write_csv(folder.with_suffix(".csv"), ["name", "what", *columns, *extra], rows)
    return markdown([folder.name, *(f"{m.upper()} {metrics.METRICS[m].arrow}" for m in columns), *extra], [
        [row["what"], *(shown(m, float(row[m])) if m in row else "" for m in columns),
         *(row.get(column, "") for column in extra)] for row in rows])


def make_rows(folder, rows, names, costs=dict):
    """Make those of `rows`, {name: (what, function of a path)}, that are in `names` and have no CSV in `folder` yet.

    The table is written after each, see `tabulate`. Returns it as Markdown, "" without any row.
    """
    words = {name: what for name, (what, _) in rows.items()}
    bar = tqdm([name for name in names if not (folder / f"{name}.csv").exists()], folder.name, unit="row")
    for name in bar:
        bar.set_postfix_str(name)
        rows[name][1](folder / f"{name}.csv")
        tabulate(folder, words, costs())
    return tabulate(folder, words, costs()) if any(folder.glob("*.csv")) else ""


def bootstrap(differences, n=10_000):
    """The 95 % interval of the mean of `differences`, by resampling."""
    x = np.asarray(differences)
    means = x[np.random.default_rng(0).integers(len(x), size=(n, len(x)))].mean(1)
    return np.quantile(means, [0.025, 0.975])


def parse(argv=None):
    parser = runs.parser(__doc__)
    add = parser.add_argument
    add("--lr", required=True, metavar="DIR", help="low-quality photos")
    add("--hr", required=True, metavar="DIR", help="their references, four times the size, matched by file name")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="see `python -m weights`")
    add("--adapter", metavar="FILE", help="of the stages (default: the model's own)")
    add("--tags", metavar="FILE.csv", help="of --lr and --data, columns image and tags; without it no rows with tags")
    add("--data", nargs="+", metavar="DIR", help="photos to train on; without them no ablations")
    add("--steps", type=int, default=300, help="of each training")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="train each with these seeds")
    add("--train-args", default="", metavar="OPTIONS", help="of train.py, for every training")
    add("--only", nargs="+", metavar="NAME", choices=[*STAGES, *VARIANTS], help="make only these rows: %(choices)s")
    add("--limit", type=int, metavar="N", help="use the first N pairs")
    add("--metrics", default="psnr,ssim,lpips,dists,niqe")
    add("--out", type=Path, default=Path("runs/ablation"), metavar="DIR")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    runs.check_ranges(args)
    return args


@runs.command
def main(argv=None):
    args = parse(argv)
    common = open_pairs(args)
    model = load_model(args.model, args.device, pick_dtype("auto", args.device), args.adapter)
    own = args.adapter or model.folder / "adapter.safetensors"
    if not Path(own).exists():
        print(f"note: {args.model} has no adapter of its own: the method's stages are the prior's", file=sys.stderr)
    common["model"] = [fingerprint(model.folder / part) for part in ("vae", "transformer")]
    tables = {"stages": {name: (what, partial(stage, name, args, model)) for name, what in STAGES.items()}}
    settings = {"stages": {"adapter": weights.sha256(Path(own)) if Path(own).exists() else "none"}}
    if args.data:
        tables["ablations"] = {f"{name}-{seed}": (f"{what}, seed {seed}", partial(variant, name, seed, args))
                               for name, (what, _) in VARIANTS.items() for seed in args.seeds}
        settings["ablations"] = {"data": args.data, "steps": args.steps, "train-args": args.train_args}
    for title in tables:
        keep_settings(args.out / title, common | settings[title])
    def wanted(row):
        name = row if row in STAGES else row.rpartition("-")[0]
        return name in (args.only or [name]) and (args.tags or name not in ("tags", "full-tags"))
    texts = [make_rows(args.out / title, rows, filter(wanted, rows)) for title, rows in tables.items()]
    texts.append(differences(args.out, args.seeds, [m for m in ("psnr", "lpips", "dists") if m in args.metrics]))
    print(f"\n{args.model}, {len(args.pairs)} pairs" + (f"; ablations of {args.steps} steps" if args.data else ""))
    print("".join(f"\n{text}\n" for text in texts if text), end="")


if __name__ == "__main__":
    main()
