"""Measures LinearSR: its experts' losses, and the table of both systems.

    python -m lab.linearsr losses --data ./hq                                held-out flow loss of each expert
    python -m lab.linearsr table --lr lr/ --hr hr/ --tags tags.csv           SANA-SR, and LinearSR in 1 to 20 steps
    python -m lab.linearsr table --lr lr/ --hr hr/ --pretrained runs/linearsr/pretrain --steps 4000
                                                                             and experts: one, two, four, uniform
    … --best ./best --fine-steps 500                                         and those fine-tuned on the best photos
    python -m lab.linearsr models --pretrained DIR --best ./best --options "--lr 3e-4 --dtype fp32"
                                                                             trains and exports the experts' rows alone

losses: on each expert's interval of t, the loss of the expert, of the network that all experts share, and of that with
the condition switched off; then expert minus shared, with the 95 % bootstrap interval over the photos.

table: every row is eval.py's, one CSV image by image. Each row of LinearSR is made for two seeds, of the noise and,
where it is trained here, of the training: a smaller difference than that between two seeds means nothing. --steps are
those of all experts of a row together, so the rows cost the same, and each is measured at their end. --out keeps
rows/NAME.csv, rows.csv (the table), NAME/ (the runs), models/ and compute.png (LPIPS against GMAC). Rows that
have their CSV are not made again. Whole models of models/, also from another machine, are not trained again. Rerun to
resume. --options: of all these trainings, as linearsr.train's. ms: the median of the pictures; GMAC: of one of 512 ×
512; both without the text encoder.
"""
import csv
import json
import math
import shlex
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from PIL import Image, ImageDraw, ImageFont
from torch import float32

import runs
import weights
from fast import load_model
from lab import stages
from lab.ablation import BICUBIC, bootstrap, keep_settings, make_rows, open_pairs, score
from lab.profile import count
from lab.stages import Stage
from linearsr import parts
from linearsr.flow import Held, Network, interval
from objective import Conditions, Latents
from photos.pairs import TrainingData
from photos.pictures import png, write_bytes
from runs import UserError, pick_device, pick_dtype
from sanasr import LinearDiT, conditioning
from weights.files import fingerprint

SEEDS = 0, 1
STEPS = 1, 2, 4, 8, 20
VARIANTS = {  # name: (what, options of linearsr.train, the row whose experts are fine-tuned)
    "pretrained": ("the pretrained network alone, at its knee", [], None),
    "pretrained-end": ("the pretrained network alone, at its end", ["--start", "end"], None),
    "one": ("one expert", ["--boundaries"], None),
    "two": ("two experts", ["--boundaries", "0.875"], None),
    "four": ("four experts", [], None),
    "uniform": ("four experts, uniform boundaries", ["--boundaries", "0.25", "0.5", "0.75"], None),
    "end": ("four experts, from the end of the pretraining", ["--start", "end"], None),
    "fine": ("four experts, fine-tuned from the knee", [], "four"),
    "fine-end": ("four experts, fine-tuned from the end", ["--start", "end"], "end"),
}

# --- losses ---


def losses(args):
    """Print the table of losses."""
    model = load_model(args.model, args.device, float32)
    shared = LinearDiT.from_pretrained(parts(weights.folder(args.model))[2], float32, args.device)
    args.crop, args.suffix = shared.config["sample_size"] * model.vae.factor, conditioning(model.metadata)["suffix"]
    args.tags, args.lq, args.workers, args.seed = args.tags or "none", None, runs.workers(4), 0
    data = TrainingData(args, args.out)
    if not data.pairs:
        raise UserError("--data: at least two photos are needed, one of them to be held out")

    def no_condition(x):  # in the place of a stem
        return x.new_zeros(len(x), model.stem.config["width"], x.shape[2] // 8, x.shape[3] // 8)
    held = Held(data.pairs, data.val_prompts, Latents(model.vae, model.scaling_factor), Conditions(model), args.device)
    print(f"{args.model}: {data.report}, {args.draws} times each")
    print(f"{'t':16}{'expert':>10}{'shared':>10}{'no condition':>14}   expert − shared (95 %)")
    for k, expert in enumerate(model.experts):
        ends = interval(k, model.boundaries)
        own, common, off = (held.flow(Network(dit, stem), ends, args.draws).mean(1) for dit, stem in (
            (expert, model.stem), (shared, model.stem), (shared, no_condition)))
        low, high = bootstrap(own - common)
        print(f"{ends[0]:5.3f} to {ends[1]:5.3f}  {own.mean():10.4f}{common.mean():10.4f}{off.mean():14.4f}   "
              f"{(own - common).mean():+.4f} ({low:+.4f} to {high:+.4f})", flush=True)


# --- table ---


def table_rows(args):
    """{name: (what, function that makes the row at a path)} of all rows, in the order of the table."""
    dtype = pick_dtype("auto", args.device)

    def make(path, name, tags=None, **options):
        model, laps = load_model(name, args.device, dtype, fast="auto"), []

        def restore(*args, **options):
            result = model.restore(*args, **options)
            laps.append(sum(ms for stage, ms in model.stages.items() if stage != "text"))
            return result
        gmac = sum(stage.times * stage.macs for stage in count(model, 512, steps=options.get("steps", 1))
                   if stage.name != "text") / 1e9
        score(SimpleNamespace(restore=restore), args.pairs, path, args, tags, **options)
        write_bytes(path.with_suffix(".json"), json.dumps({"ms": f"{median(laps):.0f}", "GMAC": f"{gmac:.1f}"}))

    rows = {"bicubic": ("bicubic", lambda path: score(BICUBIC, args.pairs, path, args)),
            "sana-sr": ("SANA-SR, 1 step", lambda path: make(path, args.sanasr))}
    if args.tags:
        rows["sana-sr-tags"] = "SANA-SR, 1 step, tags", lambda path: make(path, args.sanasr, args.tags)
    for seed in SEEDS:
        for n in STEPS:
            rows[f"steps-{n}-{seed}"] = (f"LinearSR, {n} step{'s' * (n > 1)}, seed {seed}",
                                         lambda path, n=n, seed=seed: make(path, args.model, steps=n, seed=seed))
        if args.tags:
            rows[f"tags-{seed}"] = (f"LinearSR, 20 steps, tags, seed {seed}",
                                    lambda path, seed=seed: make(path, args.model, args.tags, steps=20, seed=seed))
    for row, (name, seed) in trained(args).items():
        rows[row] = (f"{VARIANTS[name][0]}, seed {seed}", lambda path, name=name, seed=seed: make(
            path, train_variant(args, name, seed), steps=20, seed=seed))
    return rows


def trained(args):
    """{row: (variant, seed)} of all rows that are trained here."""
    return {f"{name}-{seed}": (name, seed) for name, (_, _, tuned) in VARIANTS.items() for seed in SEEDS
            if args.pretrained and (args.best or not tuned)}


def models(args):
    """Train and export what the table measures, without measuring it."""
    rows = trained(args)
    for row in chosen(args, rows, "model"):
        print(train_variant(args, *rows[row]), flush=True)


def chosen(args, names, what):
    """Those of `names` that --only names. Raises UserError for one that there is not."""
    if unknown := set(args.only or ()) - set(names):
        raise UserError(f"--only: no {what} {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return args.only or list(names)


def train_variant(args, name, seed):
    """Train a variant's experts, or go on with them, and export the model, unless it is there. Returns its folder."""
    _, options, tuned = VARIANTS[name]
    model, run = args.out / "models" / f"{name}-{seed}", (args.out / f"{tuned or name}-{seed}").resolve()
    count, alone = {"one": 1, "two": 2}.get(name, 4), name.startswith("pretrained")
    steps, fine_steps = args.steps // count, args.fine_steps // count
    if (model / "config.json").is_file():  # it is written last
        made = json.loads((model / "config.json").read_text())["_provenance"]["steps"]
        if not alone and set(made) != {wanted := fine_steps if tuned else steps}:
            raise UserError(f"{model}: its experts have {made} steps, not {wanted} each: choose another --out")
        return model
    of = "pretrain" if alone else "finetune" if tuned else "experts"
    end = ["--start", "end"] * (not alone)  # equal steps, wherever the curves have their knees

    def line(stage, *more):
        return ["linearsr.train", "--stage", stage, *more, *shlex.split(args.options), *options, "--pretrained",
                args.pretrained, "--name", run, "--device", args.device.type]
    todo = [Stage(model.name, line("export", "--to", model, "--of", of) + end, model / "config.json")]
    if tuned:
        todo.insert(0, Stage(f"{model.name}, fine-tuning", line(
            "finetune", "--data", args.best, "--steps", fine_steps, "--every", args.every)))
    if not alone:
        todo.insert(0, Stage(f"{model.name}, experts", line(
            "experts", "--seed", seed, "--steps", steps, "--every", args.every)))
    stages.run(todo)
    return model


def draw(path, table, also, width=960, height=540):
    """A chart of LPIPS against GMAC, the latter on a logarithmic axis: a point a row, LinearSR's of one seed joined.

    table: what `tabulate` wrote; a row without GMAC is a level. also: [(what, GMAC, LPIPS)], from elsewhere.
    """
    with open(table, newline="", encoding="utf-8") as f:
        rows = [(row["name"], row["what"], float(row.get("GMAC") or 0), float(row["lpips"]))
                for row in csv.DictReader(f) if row.get("lpips")]
    rows += [("", what, float(gmac), float(lpips)) for what, gmac, lpips in also]
    points = [row for row in rows if row[2]]
    if not points:
        return
    low, high = (f(gmac for _, _, gmac, _ in points) for f in (min, max))
    bottom, top = min(y for *_, y in rows) - 0.01, max(y for *_, y in rows) + 0.01
    canvas = Image.new("RGB", (width, height), "white")
    pen, font, last, labels = ImageDraw.Draw(canvas), ImageFont.load_default(13), {}, []

    def at(gmac, lpips):
        share = math.log(gmac / low) / max(math.log(high / low), 1e-9)
        return 60 + share * (width - 260), 20 + (top - lpips) / (top - bottom) * (height - 60)
    pen.rectangle((*at(low, top), *at(high, bottom)), outline="#808080")
    for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        x, y = at(10 ** k, bottom)
        pen.line((x, y, x, y - 6), "#808080")
        pen.text((x - 10, y + 4), f"{10 ** k}", "black", font)
    for lpips in (bottom, top):
        pen.text((10, at(low, lpips)[1] - 8), f"{lpips:.3f}", "black", font)
    pen.text((60, height - 22), "GMAC of one picture (logarithmic); up: LPIPS, lower is better", "black", font)
    for _, what, gmac, lpips in rows:
        if not gmac:
            pen.line((*at(low, lpips), *at(high, lpips)), "#808080")
            pen.text((at(high, lpips)[0] + 8, at(high, lpips)[1] - 8), what, "black", font)
    for name, what, gmac, lpips in sorted(points, key=lambda point: point[2]):
        x, y = at(gmac, lpips)
        seed = name.rpartition("-")[2] if name.startswith("steps-") else None
        if seed in last:
            pen.line((*last[seed], x, y), "#1040c0")
        last |= {seed: (x, y)} if seed else {}
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), "#1040c0" if seed else "#c01010")
        if seed in (None, str(SEEDS[0])):  # the other seed's points lie beside
            text, y = what.partition(", seed")[0], y - 8
            right = x + 8 + font.getlength(text)
            while any(x < b and a < right and abs(y - c) < 14 for a, b, c in labels):
                y += 1
            labels.append((x, right, y))
            pen.text((x + 8, y), text, "black", font)
    write_bytes(path, png(canvas))


def table(args):
    """Make the rows that are lacking, and the table."""
    settings = open_pairs(args)
    rows, folder = table_rows(args), args.out / "rows"
    model, sanasr = weights.folder(args.model), weights.folder(args.sanasr)
    wanted = chosen(args, rows, "row")
    keep_settings(folder, settings | {
        "linearsr": [fingerprint(part) for part in (model, parts(model)[2], model / "stem", model / "experts")
                     if part.is_dir()],
        "sanasr": [fingerprint(sanasr / part) for part in ("", "vae", "transformer")], "pretrained": args.pretrained,
        "steps": args.pretrained and args.steps, "best": args.best, "fine-steps": args.best and args.fine_steps,
        "options": args.options or None})

    def costs():
        return {path.stem: json.loads(path.read_text()) for path in (folder / f"{name}.json" for name in rows)
                if path.exists()}
    text = make_rows(folder, rows, wanted, costs)
    draw(args.out / "compute.png", folder.with_suffix(".csv"), args.also)
    print(f"\n{args.model} and {args.sanasr}, {len(args.pairs)} pairs\n\n{text}")


def parse(argv=None):
    p = runs.parser(__doc__)
    add = p.add_argument
    add("command", choices=["losses", "table", "models"])
    add("--model", default="linearsr-embedded", metavar="NAME|FOLDER", help="LinearSR")
    add("--tags", metavar="FILE.csv", help="tags of the pictures, columns image and tags")
    add("--out", type=Path, default=Path("runs/lab-linearsr"), metavar="DIR")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add = p.add_argument_group("losses").add_argument
    add("--data", nargs="+", metavar="DIR", help="photos, those of the training")
    add("--val", type=int, default=64, metavar="N", help="held-out photos")
    add("--draws", type=int, default=8, metavar="N", help="times t on each photo and interval")
    add("--mild", type=float, default=0.5, metavar="SHARE", help="of the pairs, as in the training")
    add = p.add_argument_group("table").add_argument
    add("--lr", metavar="DIR", help="low-quality photos")
    add("--hr", metavar="DIR", help="their references")
    add("--sanasr", default="embedded", metavar="NAME|FOLDER", help="SANA-SR")
    add("--pretrained", metavar="DIR", help="the folder of a pretraining, from which the experts' rows are trained")
    add("--steps", type=int, default=4000, help="of each of these rows, all its experts together")
    add("--best", metavar="DIR", help="the best photos, for the fine-tuned rows")
    add("--fine-steps", type=int, default=1000, help="of the fine-tuning, all experts together")
    add("--every", type=int, default=250, metavar="N", help="validate every N steps of a training")
    add("--options", default="", metavar='"--lr 3e-4 …"', help="of linearsr.train, for all these trainings")
    add("--only", nargs="+", metavar="NAME", help="make only these rows, or models")
    add("--also", nargs=3, action="append", default=[], metavar=("WHAT", "GMAC", "LPIPS"), help="another point of the "
        "chart")
    add("--limit", type=int, metavar="N", help="use the first N pairs")
    add("--metrics", default="psnr,ssim,lpips,dists,niqe")
    args = p.parse_args(argv)
    runs.check_ranges(args)
    args.device = pick_device(args.device)
    needed = {"losses": ["data"], "table": ["lr", "hr"], "models": ["pretrained"]}[args.command]
    if lacking := [f"--{name}" for name in needed if not getattr(args, name)]:
        p.error(f"{args.command} needs {' and '.join(lacking)}")
    for path in [*(args.data or ()), *filter(None, (args.lr, args.hr, args.tags, args.pretrained, args.best))]:
        if not Path(path).exists():
            p.error(f"{path}: no such file or folder")
    return args


@runs.command
def main(argv=None):
    args = parse(argv)
    {"losses": losses, "table": table, "models": models}[args.command](args)


if __name__ == "__main__":
    main()
