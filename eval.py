"""Restores pictures to four times their size.

    python eval.py lr.png                              -> results/lr_x4.png, with the bundled model
    python eval.py photos/ --out restored --compare    a folder; bicubic enlargements are written beside the results
    python eval.py lr.png --model sana-600m-512 --adapter lora.safetensors --device cuda --prompt "a red brick wall"
    torchrun --nproc_per_node 4 eval.py photos/        the files are split among the ranks
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
import argparse
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from fast import is_linearsr, load_model
from metrics import METRICS
from metrics.report import write_report
from metrics.score import Pair, evaluate, partners, pick, print_table, write_scores
from photos import pictures
from photos.pairs import find_tags
from photos.pictures import bicubic, find_inputs, read_rgb, reason
from photos.restorer import NotFinite
from runs import UserError, add_device_options, check_ranges, command, peak_memory, pick_device, pick_dtype, set_flags

# --- inputs and results ---

@dataclass(frozen=True)
class Job:
    """One picture to restore."""
    source: Path
    target: Path

    @property
    def compare(self):
        return self.target.with_name(f"{self.target.stem}_bicubic{self.target.suffix}")


def plan(inputs, out, scale, references):
    """Where each input's result goes: `out` is a file for a single input, else a folder, results/ by default.

    Inputs of one stem (a.png, a.jpg) get different results. Raises UserError where an input or a reference would be
    overwritten.
    """
    folder = Path(out or "results")
    single = None
    if out and not folder.is_dir() and not out.endswith(("/", os.sep)) and folder.suffix:
        if folder.suffix.lower() not in pictures.picture_suffixes(Image.SAVE):
            raise UserError(f"--out {out}: no picture format is called {folder.suffix}; end a folder's name with /")
        if len(inputs) != 1:
            raise UserError(f"--out {out} is one file but there are {len(inputs)} inputs: name a folder")
        single = folder
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file, not a folder")
    jobs, taken = [], set()
    for source in inputs:
        stem, n = source.stem, 1
        while stem.lower() in taken:  # lower: macOS and Windows tell no difference
            n += 1
            stem = f"{source.stem}-{n}"
        taken.add(stem.lower())
        jobs.append(Job(source, single or folder / f"{stem}_x{scale}.png"))

    def identity(path):  # the same for all names of one file
        return (path.stat().st_dev, path.stat().st_ino) if path.exists() else None
    kept = {identity(path) for path in [*inputs, *references]} - {None}
    for job in jobs:
        for target in (job.target, job.compare):
            if identity(target) in kept:
                raise UserError(f"the result of {job.source} would overwrite {target}: choose another --out")
    return jobs


# --- one picture ---

class Skipped(Exception):
    """This picture cannot be restored; the others are. The message says why."""


def tile_bar():
    """progress(stage, done, total) for `SanaSR.restore`: a bar over the tiles of each stage; none for a single tile."""
    bar = None

    def progress(stage, done, total):
        nonlocal bar
        if total == 1:
            return
        bar = bar if done else tqdm(total=total, desc=stage, unit="tile", leave=False, disable=None)  # on a terminal
        bar.update(done - bar.n)
        if done == total:
            bar.close()
    return progress


def restore(job, model, args, tags=(), progress=None):
    """Read, restore and write one picture: the line that is printed for it. Raises Skipped.

    tags: what the picture shows, for the prompt. progress: see `SanaSR.restore`.
    Raises OSError or ValueError where the model's text encoder, which is loaded on the first new prompt, is broken.
    """
    start = time.perf_counter()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    if not job.source.is_file():
        raise Skipped("neither a file nor a folder" if job.source.exists() else "no such file or folder")
    try:
        picture = pictures.read(job.source)
    except Exception as error:  # on broken files the decoders raise anything, from struct.error to IndexError
        raise Skipped(f"not a picture that can be read ({reason(error, job.source)})") from error
    width, height = picture.rgb.size
    prompt = ", ".join(filter(None, [args.prompt, *tags]))
    try:
        result = pictures.restored(model, picture, prompt, args.color_fix, args.scale, suffix=args.suffix,
                                   tile=args.tile, instruction=args.instruction, progress=progress, **args.sampling)
    except NotFinite as error:
        raise Skipped(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise Skipped(f"{width}×{height} needs more memory than there is; try a smaller --tile") from error
        raise
    try:
        metadata = () if args.no_metadata else (picture.icc, picture.exif)
        pictures.write(result, job.target, *metadata)
        if args.compare:
            pictures.write(picture.finish(bicubic(picture.rgb, args.scale), args.scale), job.compare, *metadata)
    except (OSError, ValueError) as error:
        raise Skipped(f"{job.target} cannot be written ({reason(error, job.target)})") from error
    stages = "  ".join(f"{stage} {ms:.0f}" for stage, ms in model.stages.items())
    peak = peak_memory(args.device)
    return (f"{job.source.name}  {width}×{height} → {args.scale * width}×{args.scale * height}  ms: {stages}"
            f"  total {time.perf_counter() - start:.2f} s{'' if peak is None else f'  peak {peak:.2f} GB'}"
            f"  → {job.target}")


def input_tags(jobs, args, references):
    """{job: its tags} by args.tagger; empty where the tagger's weights are unavailable.

    Tags describe the enlarged input, or with --prompt-from hr the reference, `references[job.target]`. All pictures are
    tagged, and the tagger's memory is free, before the restorer is loaded.
    """
    def picture(i):
        if args.prompt_from == "hr":
            return read_rgb(references[jobs[i].target])
        try:
            return bicubic(read_rgb(jobs[i].source), args.scale)
        except (MemoryError, ValueError):  # restore() will say what is wrong with it
            return None
    if args.tagger == "none":
        return {}
    found = find_tags(args.tagger, [job.source.name for job in jobs], picture, args.device)
    return dict(zip(jobs, found, strict=True)) if found else {}


# --- scores ---

def find_pairs(args, jobs):
    """[Pair] to score: the results of `jobs`, or the pictures in --sr, with their partners in --hr.

    With --sr, the inputs are only shown in the report. Raises UserError or ValueError.
    """
    if args.sr:
        results = [p for p in find_inputs([args.sr]) if not re.search(r"_x[124]_bicubic$", p.stem)]  # of --compare
        names = [p.name for p in results]
        if not results:
            raise UserError(f"{args.sr}: only enlargements of --compare there; rename them to score them")
        inputs = args.inputs and partners(names, " ".join(args.inputs), find_inputs(args.inputs))
    else:
        results, inputs = [job.target for job in jobs], [job.source for job in jobs]
        names = [path.name for path in inputs]
    there = find_inputs([args.hr]) if args.hr else []
    references = partners(names, args.hr, there) if args.hr else [None] * len(names)
    if len(there) > len(names):
        print(f"note: {len(there) - len(names)} of the pictures in {args.hr} have no result", file=sys.stderr)
    return [Pair(*pair) for pair in zip(names, results, references, inputs or [None] * len(names), strict=True)]


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

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="pictures and folders of pictures")
    add("--out", metavar="PATH", help="folder, or file for one input (default: results/<stem>_x4.png)")
    add("--scale", type=int, choices=[1, 2, 4], default=4, help="size of the result; 1 cleans a picture that is large "
        "but spoilt, without enlarging it (default: 4)")
    add("--color-fix", choices=pictures.COLOUR_FIXES, default="none", help="colours of the enlarged input")
    add("--no-metadata", action="store_true", help="results without the input's EXIF and colour profile")
    add("--compare", action="store_true", help="write the bicubic enlargement beside the result")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="see `python -m weights` (default: embedded)")
    add_device_options(parser.add_argument)
    add("--fast", choices=["auto", "on", "off"], default="auto", help="the rewrites of fast/: the same result up to "
        "rounding, sooner; on a GPU with CUDA graphs (auto: on a CPU or an NVIDIA GPU)")
    add("--tile", type=int, metavar="N", help="largest side, in pixels of the result, that the networks see at once "
        "(default: 1408; 0: no limit)")
    add_method_options(parser)
    add_score_options(parser.add_argument_group("scores"))
    args = parser.parse_args(argv)
    args.score = any([args.hr, args.sr, args.metrics, args.csv, args.report])
    check(args)
    return args


def add_method_options(parser):
    """The prompt, and what either system alone takes."""
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


def add_score_options(parser):
    add = parser.add_argument
    add("--hr", metavar="DIR", help="references, matched by file name")
    add("--sr", metavar="DIR", help="results that exist already: nothing is restored")
    add("--metrics", metavar="LIST", help=f"{','.join(METRICS)} or all, which leaves out "
        f"{' and '.join(name for name in METRICS if not METRICS[name].usual)} (default: those without a download)")
    add("--protocol", choices=["full", "patch"], default="full", help="the whole image or its central 256×256")
    add("--csv", metavar="FILE", help="scores image by image, and a mean row")
    add("--report", metavar="FILE.html", help="a page that shows pictures and scores side by side")


def check(args):
    """Check what argparse cannot; read --instruction, resolve --metrics. Raises UserError or ValueError."""
    mistakes = {
        "name pictures or folders to restore, or --sr DIR to score what exists": not args.inputs and not args.sr,
        "--prompt-from hr needs pictures to restore, --tagger ram or dape, and --hr DIR":
            args.prompt_from == "hr" and (args.tagger not in ("ram", "dape") or not args.hr or args.sr),
    } | {f"{folder}: no such folder": not Path(folder).exists() for folder in (args.sr, args.hr) if folder}
    if found := [mistake for mistake, made in mistakes.items() if made]:
        raise UserError(found[0])
    check_ranges(args)
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


def restore_all(jobs, model, args, tags, single, quiet):
    """Restore `jobs`: (how many were restored, the targets of those that were skipped). A line tells of each.

    single: it is the only picture of the run, so that its tiles have bars. quiet: no bar over the pictures.
    """
    done, skipped = 0, []
    for job in tqdm(jobs, unit="img", disable=True if single or quiet else None):  # None: on a terminal
        try:
            tqdm.write(restore(job, model, args, tags.get(job, ()), tile_bar() if single else None))
            done += 1
        except Skipped as why:
            skipped.append(job.target)
            tqdm.write(" ".join(f"error: {job.source}: {why}".split()), file=sys.stderr)  # a name may hold newlines
    return done, skipped


@command
def main(argv=None):
    args = parse(argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = pick_dtype(args.dtype, args.device)
    torch.manual_seed(args.seed)
    set_flags()
    warnings.filterwarnings("ignore", module="PIL")  # about odd files; errors are raised
    if args.sr:
        score(find_pairs(args, []), args)
        return 0
    choose_system(args)
    jobs = plan(find_inputs(args.inputs), args.out, args.scale, find_inputs([args.hr]) if args.hr else [])
    pairs = find_pairs(args, jobs) if args.score else []
    if ranks > 1:  # so that all ranks end together: torchrun ends the others as soon as one rank fails
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    tags = input_tags(jobs[rank::ranks], args, {pair.sr: pair.hr for pair in pairs})
    model = load_model(args.model, args.device, args.dtype, args.adapter, args.fast, args.offload)
    done, skipped = restore_all(jobs[rank::ranks], model, args, tags, single=len(jobs) == 1, quiet=rank > 0)
    if len(jobs) > 1:
        print(f"{done} restored, {len(skipped)} skipped" + (f" (rank {rank})" if ranks > 1 else ""))
    if ranks > 1:
        torch.distributed.all_gather_object(every := [None] * ranks, skipped)
        skipped = sum(every, [])
    model = None  # scoring needs the memory
    pairs = [pair for pair in pairs if pair.sr not in skipped]
    if pairs and rank == 0:
        score(pairs, args, note="prompts from the references" if tags and args.prompt_from == "hr" else "")
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
