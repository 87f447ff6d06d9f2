"""Restores pictures to four times their size.

    python eval.py lr.png                              -> results/lr_x4.png, with the bundled model
    python eval.py pictures/ --out restored --compare  a folder; bicubic enlargements are written beside the results
    python eval.py lr.png --model sana-600m-512 --adapter lora.safetensors --device cuda --prompt "a red brick wall"
    torchrun --nproc_per_node 4 eval.py pictures/      the files are split among the ranks
    python eval.py lr/ --hr hr/ --csv scores.csv --report report.html      restores, then scores against references
    python eval.py --sr results/ --hr hr/ --metrics all                    scores pictures of any method
    python eval.py lr.png --model linearsr-embedded --steps 20             LinearSR: many steps, from --seed's noise

Reads every picture format that Pillow decodes, with EXIF orientation applied. Grey pictures come out grey, alpha is
enlarged (bicubic) and kept, 16 bits become 8, of an animation the first frame is taken. Inputs are never overwritten
and every result appears whole or not at all. A broken file among many is reported and skipped: the exit code is then 1.
It needs the packages of requirements.txt; --model embedded needs no download. `python -m weights` lists the models.

Scores are made with metrics/: the reference of a picture is the file of the same name in --hr (the endings and an _x4
may differ). Without --hr, metrics that need no reference remain. psnr, ssim, lpips and niqe need no download.
"""
import os
import re
import sys
import time
import warnings
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import runs
from fast import is_linearsr, load_model
from metrics import METRICS
from metrics.report import write_report
from metrics.score import Pair, evaluate, partners, pick, print_table, write_scores
from photos import pictures
from photos.pairs import find_tags
from photos.pictures import bicubic, find_inputs, read_rgb, reason
from photos.restorer import NotFinite
from runs import UserError
from sanasr import build_prompt, conditioning

# --- inputs and results ---


def beside(result):
    """Where --compare writes the bicubic enlargement."""
    return result.with_name(f"{result.stem}_bicubic{result.suffix}")


def protect(args, read, targets):
    """Raise UserError where one of the files to write, [(what, path or None, option)], is one of those to read."""
    def identity(path):  # the same for all names of one file
        path = Path(path)
        return (path.stat().st_dev, path.stat().st_ino) if path.exists() else None
    table = [args.tagger] if args.tagger not in ("none", "ram", "dape") else []
    kept = {identity(path) for path in [*read, *(find_inputs([args.hr]) if args.hr else []), *table]} - {None}
    for what, target, option in (*targets, ("--csv", args.csv, "--csv"), ("--report", args.report, "--report")):
        if target and identity(target) in kept:
            raise UserError(f"{what} would overwrite {target}: choose another {option}")


def plan(args):
    """[Pair] of the inputs, where their results go and their references: --out is a file for a single input, else a
    folder, results/ by default.

    Inputs of one stem (a.png, a.jpg) get different results. Raises UserError as `protect` does, ValueError where a
    picture or a reference is missing.
    """
    inputs, folder, single = find_inputs(args.inputs), Path(args.out or "results"), None
    if args.out and not folder.is_dir() and not args.out.endswith(("/", os.sep)) and folder.suffix:
        if folder.suffix.lower() not in pictures.picture_suffixes(Image.SAVE) - {".ico", ".icns"}:  # of fixed sizes
            raise UserError(f"--out {folder}: {folder.suffix} cannot hold a result; end a folder's name with /")
        if len(inputs) != 1:
            raise UserError(f"--out {folder} is one file but there are {len(inputs)} inputs: name a folder")
        single = folder
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file, not a folder")
    results, taken = [], set()
    for source in inputs:
        stem, n = source.stem, 1
        while stem.lower() in taken:  # lower: macOS and Windows tell no difference
            n += 1
            stem = f"{source.stem}-{n}"
        taken.add(stem.lower())
        results.append(single or folder / f"{stem}_x{args.scale}.png")

    protect(args, inputs, [(f"the result of {source}", target, "--out") for source, result in
                           zip(inputs, results, strict=True) for target in (result, beside(result))])
    return pair_up([source.name for source in inputs], results, inputs, args.hr)


def existing(args):
    """[Pair] of the pictures in --sr and their references. The inputs, if any are named, are shown in the report."""
    results = [p for p in find_inputs([args.sr]) if not re.search(r"_x[124]_bicubic$", p.stem)]  # of --compare
    if not results:
        raise UserError(f"{args.sr}: only enlargements of --compare there; rename them to score them")
    protect(args, results, [])
    names = [p.name for p in results]
    inputs = args.inputs and partners(names, " ".join(args.inputs), find_inputs(args.inputs))
    return pair_up(names, results, inputs or [None] * len(names), args.hr)


def pair_up(names, results, inputs, hr):
    """[Pair], each with its partner in the folder `hr`. Raises ValueError where one has none."""
    there = find_inputs([hr]) if hr else []
    references = partners(names, hr, there) if hr else [None] * len(names)
    if len(there) > len(names):
        print(f"note: {len(there) - len(names)} of the pictures in {hr} have no result", file=sys.stderr)
    return [Pair(*pair) for pair in zip(names, results, references, inputs, strict=True)]


# --- one picture ---

class Skipped(Exception):
    """This picture cannot be restored; the others are. The message says why."""


def tile_bar():
    """progress(stage, done, total) for `SanaSR.restore`: on a terminal a bar over the tiles of a stage, if several."""
    bar = None

    def progress(stage, done, total):
        nonlocal bar
        if total > 1:
            bar = bar if done else tqdm(total=total, desc=stage, unit="tile", leave=False, disable=None)
            bar.update(done - bar.n)
            if done == total:
                bar.close()
    return progress


def joined(args, tags):
    """The content part of a prompt."""
    return ", ".join(filter(None, [args.prompt, *tags]))


def restore(pair, model, args, tags=(), progress=None):
    """Restore the picture pair.lr and write the result pair.sr: the line that is printed for it.

    tags: what the picture shows, for the prompt. progress: see `SanaSR.restore`. Raises Skipped or NotFinite.
    Raises OSError or ValueError where the model's text encoder, which is loaded on the first new prompt, is broken.
    """
    start = time.perf_counter()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    if not pair.lr.is_file():
        raise Skipped("neither a file nor a folder" if pair.lr.exists() else "no such file or folder")
    try:
        picture = pictures.read(pair.lr)
    except Exception as error:  # on broken files the decoders raise anything, from struct.error to IndexError
        raise Skipped(f"not a picture that can be read ({reason(error, pair.lr)})") from error
    width, height = picture.rgb.size
    prompt = joined(args, tags)
    try:
        result = pictures.restored(model, picture, prompt, args.color_fix, args.scale, suffix=args.suffix,
                                   tile=args.tile, instruction=args.instruction, progress=progress, **args.sampling)
    except (MemoryError, RuntimeError) as error:
        if runs.out_of_memory(error):
            raise Skipped(f"{width}×{height} needs more memory than there is; cut it, or take a smaller "
                          "--tile") from error
        raise
    try:
        metadata = () if args.no_metadata else (picture.icc, picture.exif)
        pictures.write(result, pair.sr, *metadata)
        if args.compare:
            pictures.write(picture.finish(bicubic(picture.rgb, args.scale), args.scale), beside(pair.sr), *metadata)
    except (OSError, ValueError) as error:
        raise Skipped(f"{pair.sr} cannot be written ({reason(error, pair.sr)})") from error
    stages = "  ".join(f"{stage} {ms:.0f}" for stage, ms in model.stages.items())
    peak = runs.peak_memory(args.device)
    return (f"{pair.name}  {width}×{height} → {args.scale * width}×{args.scale * height}  ms: {stages}"
            f"  total {time.perf_counter() - start:.2f} s{'' if peak is None else f'  peak {peak:.2f} GB'}"
            f"  → {pair.sr}")


def input_tags(pairs, args):
    """{pair: its tags} by args.tagger; empty where the tagger's weights are unavailable.

    Tags describe the enlarged input, or with --prompt-from hr the reference. All pictures are tagged, and the tagger's
    memory is free, before the restorer is loaded.
    """
    def picture(i):
        if args.prompt_from == "hr":
            return read_rgb(pairs[i].hr)
        try:
            return bicubic(read_rgb(pairs[i].lr), args.scale)
        except (MemoryError, ValueError):  # restore() will say what is wrong with it
            return None
    found = find_tags(args.tagger, [pair.name for pair in pairs], picture, args.device)
    if found and args.tagger != "none" and (lacking := found.count([])):
        print(f"note: {args.tagger} has no tags for {lacking} of {len(pairs)} pictures", file=sys.stderr)
    return dict(zip(pairs, found, strict=True)) if found else {}


def encode_prompts(model, args, tags):
    """Keep the text states of all prompts on the disk: the text encoder is loaded once, not for each picture."""
    how = conditioning(model.metadata, args.suffix, instruction=args.instruction)
    prompts = sorted({build_prompt(joined(args, found), how["suffix"]) for found in tags.values()})
    for i in range(0, len(prompts), 512):
        model.prompts(prompts[i:i + 512], how["instruction"])


# --- scores ---


def score(pairs, args, note=""):
    """Score `pairs`, print the table and write --csv and --report, each with `note`. Raises as `evaluate` does."""
    rows = evaluate(None, pairs, args.metrics, protocol=args.protocol, device=args.device,
                    progress=lambda x: tqdm(x, desc="scoring", unit="img", disable=None))
    print_table(rows, note)
    if args.csv:
        write_scores(rows, args.csv, note)
    if args.report:
        made_by = [] if args.sr else [args.model]
        write_report(rows, pairs, args.report, args.protocol, note=", ".join(filter(None, [*made_by, note])))


# --- the command ---

RESTORING = ("out", "scale", "color_fix", "no_metadata", "compare", "model", "fast", "tile", "prompt", "suffix",
             "instruction", "tagger", "adapter", "timestep", "steps", "seed", "cfg", "offload")


def parse(argv=None):
    parser = runs.parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="pictures and folders of pictures")
    add("--out", metavar="PATH", help="folder, or file for one input (default: results/<stem>_x4.png)")
    add("--scale", type=int, choices=[1, 2, 4], default=4, help="size of the result; 1 cleans a picture that is large "
        "but spoilt, without enlarging it (default: 4)")
    add("--color-fix", choices=pictures.COLOUR_FIXES, default="none", help="colours of the enlarged input")
    add("--no-metadata", action="store_true", help="results without the input's EXIF and colour profile")
    add("--compare", action="store_true", help="write the bicubic enlargement beside the result")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="see `python -m weights`")
    runs.add_device_options(add)
    add("--fast", choices=["auto", "on", "off"], default="auto", help="the rewrites of fast/: the same result up to "
        "rounding, sooner; on a GPU with CUDA graphs (auto: on a CPU or an NVIDIA GPU)")
    add("--tile", type=int, metavar="N", help="largest side, in pixels of the result, that the networks see at once "
        "(default: 1408; 0: no limit)")
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt", default="", metavar="TEXT", help="what the picture shows")
    add("--suffix", metavar="appendix|main|none|TEXT", help="quality words after the prompt (default: what the adapter "
        "was trained with, else appendix)")
    add("--instruction", type=Path, metavar="FILE", help="a text put before every prompt, as SANA's human instruction "
        "(default: the adapter's, else none)")
    add("--tagger", metavar="none|ram|dape|FILE.csv", default="none",
        help="finds tags for the prompt in the picture, or takes them from the columns image and tags of a file")
    add("--prompt-from", choices=["lr", "hr"], default="lr", help="where the tags come from; hr: the references, which "
        "leaks them into the result (the paper's HQ-prompt protocol read literally); scores are marked")
    add = parser.add_argument_group("SANA-SR alone, which takes one step").add_argument
    add("--adapter", metavar="PATH", help="LoRA weights, as written by train.py (default: the model's own, if it has "
        "any); none: the bare prior")
    add("--timestep", type=float, metavar="N", help="τ of the one update (default: the adapter's, else 900)")
    add = parser.add_argument_group("LinearSR alone, which takes many steps").add_argument
    add("--steps", type=int, metavar="N", help="evaluations of the network (default: 20)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise; SANA-SR draws none: its restoration is the "
        "same for every seed")
    add("--cfg", type=float, metavar="X", help="scale of classifier-free guidance; other than 1 it doubles the time "
        "(default: 1)")
    add("--offload", action="store_true", help="keep only the expert in use on the device")
    add = parser.add_argument_group("scores").add_argument
    add("--hr", metavar="DIR", help="references, matched by file name")
    add("--sr", metavar="DIR", help="results that exist already: nothing is restored")
    add("--metrics", metavar="LIST", help=f"{','.join(METRICS)} or all, which leaves out "
        f"{' and '.join(name for name in METRICS if not METRICS[name].usual)} (default: those without a download)")
    add("--protocol", choices=["full", "patch"], default="full", help="the whole image or its central 256×256")
    add("--csv", metavar="FILE", help="scores image by image, and a mean row")
    add("--report", metavar="FILE.html", help="a page that shows pictures and scores side by side")
    args = parser.parse_args(argv)
    if args.sr and (given := [name for name in RESTORING if getattr(args, name) != parser.get_default(name)]):
        raise UserError(f"--sr restores nothing: leave out --{' --'.join(given).replace('_', '-')}")
    args.score = any([args.hr, args.sr, args.metrics, args.csv, args.report])
    check(args)
    return args


def check(args):
    """Check what argparse cannot; read --instruction, resolve --metrics. Raises UserError or ValueError."""
    if not args.inputs and not args.sr:
        raise UserError("name pictures or folders to restore, or --sr DIR to score what exists")
    if args.prompt_from == "hr" and (args.tagger not in ("ram", "dape") or not args.hr or args.sr):
        raise UserError("--prompt-from hr needs pictures to restore, --tagger ram or dape, and --hr DIR")
    for folder in filter(None, (args.sr, args.hr)):
        if not Path(folder).exists():
            raise UserError(f"{folder}: no such folder")
    runs.check_ranges(args)
    if args.score:
        args.metrics = pick(args.metrics, bool(args.hr))
    if args.instruction:
        try:
            args.instruction = args.instruction.read_text("utf-8").removesuffix("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"--instruction {args.instruction}: {reason(error)}")


def choose_system(args):
    """args.sampling: what the `restore` of --model's system takes and the other's does not.

    Raises UserError where an option belongs to the other system.
    """
    args.sampling = {"timestep": args.timestep}
    foreign, what = ("steps", "cfg", "offload"), "SANA-SR, which takes one step"
    if is_linearsr(args.model, args.dtype):
        args.sampling = {"steps": args.steps or 20, "seed": args.seed, "cfg": 1.0 if args.cfg is None else args.cfg}
        foreign, what = ("adapter", "timestep"), "LinearSR, which has no adapter and no τ"
    if given := [f"--{name}" for name in foreign if getattr(args, name) not in (None, False)]:
        raise UserError(f"{', '.join(given)}: {args.model} is a model of {what}; leave it out or name another --model")


def restore_all(pairs, model, args, tags, single, quiet):
    """Restore the inputs of `pairs`, with a line for each. Returns the results that are missing: those skipped.

    single: it is the only picture of the run, so that its tiles have bars. quiet: no bar over the pictures.
    """
    skipped = []
    for pair in tqdm(pairs, unit="img", disable=True if single or quiet else None):  # None: on a terminal
        try:
            tqdm.write(restore(pair, model, args, tags.get(pair, ()), tile_bar() if single else None))
        except (Skipped, NotFinite) as why:
            skipped.append(pair.sr)
            tqdm.write(" ".join(f"error: {pair.lr}: {why}".split()), file=sys.stderr)  # a name may hold newlines
    return skipped


@runs.command
def main(argv=None):
    args = parse(argv)
    args.device = runs.pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = runs.pick_dtype(args.dtype, args.device)
    runs.set_flags()
    warnings.filterwarnings("ignore", module="PIL")  # about odd files; errors are raised
    if args.sr:
        score(existing(args), args)
        return 0
    pairs = plan(args)
    choose_system(args)
    with runs.process_group(torch.device("cpu")):
        rank, world = runs.ranks()
        mine = pairs[rank::world]
        tags = input_tags(mine, args)
        model = load_model(args.model, args.device, args.dtype, args.adapter, args.fast, args.offload)
        if any(tags.values()):
            encode_prompts(model, args, tags)
        skipped = restore_all(mine, model, args, tags, single=len(pairs) == 1, quiet=rank > 0)
        if len(pairs) > 1:
            where = f" (rank {rank})" if world > 1 else ""
            print(f"{len(mine) - len(skipped)} restored, {len(skipped)} skipped{where}")
        if world > 1:
            torch.distributed.all_gather_object(every := [None] * world, skipped)
            skipped = sum(every, [])
        model = None  # scoring needs the memory
        scored = [pair for pair in pairs if args.score and pair.sr not in skipped]
        note = "prompts from the references" if tags and args.prompt_from == "hr" else ""
        # the other ranks wait: torchrun ends all as soon as one of them fails
        runs.from_first(lambda: score(scored, args, note) if scored else None)
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
