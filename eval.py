"""Restores pictures to four times their size.

    python eval.py lr.png                              -> results/lr_x4.png, with the model that the repository carries
    python eval.py photos/ --out restored --compare    a folder; bicubic enlargements are written beside the results
    python eval.py lr.png --model sana-600m-512 --adapter lora.safetensors --device cuda --prompt "a red brick wall"
    torchrun --nproc_per_node 4 eval.py photos/        the files are split among the ranks
    python eval.py lr/ --hr hr/ --csv scores.csv --report report.html      restores, then scores against references
    python eval.py --sr results/ --hr hr/ --metrics all                    scores pictures of any method
    python eval.py --profile                       parameters, multiply-accumulates and latency by stage
    python eval.py lr.png --model linearsr-embedded --steps 20             LinearSR: many steps, from --seed's noise
    python eval.py photos/ --stability             what degradations change in latents and in pixels (the paper's §3.1)

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
from photos.pictures import (
    COLOUR_FIXES,
    bicubic,
    find_inputs,
    one_line,
    picture_suffixes,
    read,
    read_rgb,
    reason,
    restored,
    write,
)
from runs import DTYPES, UserError, command, peak_memory, pick_device, pick_dtype

# --- inputs and results ---


@dataclass(frozen=True)
class Job:
    """One picture to restore."""
    source: Path
    target: Path

    @property
    def compare(self):
        return self.target.with_name(f"{self.target.stem}_bicubic{self.target.suffix}")


def plan(inputs, out=None, scale=4, references=()):
    """Where each input's result goes: `out` is a file for a single input, else a folder, results/ by default.

    Inputs of one stem (a.png, a.jpg) get different results. Raises UserError where an input or a reference would be
    overwritten.
    """
    folder = Path(out or "results")
    single = None
    if out and not folder.is_dir() and not out.endswith(("/", os.sep)) and folder.suffix:
        if folder.suffix.lower() not in picture_suffixes(Image.SAVE):
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

    def same(path):  # for all names of one file
        return (path.stat().st_dev, path.stat().st_ino) if path.exists() else None
    kept = [*inputs, *references]
    names, files = {os.path.realpath(p) for p in kept}, {same(p) for p in kept} - {None}
    for job in jobs:
        for target in (job.target, job.compare):
            if os.path.realpath(target) in names or same(target) in files:
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
        if done == 0:
            bar = tqdm(total=total, desc=stage, unit="tile", leave=False, disable=None)  # None: on a terminal
        else:
            bar.update()
        if done == total:
            bar.close()
    return progress


def restore(job, model, args, tags=(), progress=None):
    """Read, restore and write one picture. Returns what is worth reporting; raises Skipped.

    tags: what the picture shows, for the prompt. progress: see `SanaSR.restore`.
    Raises UserError where the model's text encoder, which is loaded on the first new prompt, turns out broken.
    """
    start = time.perf_counter()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    if not job.source.exists():
        raise Skipped("no such file or folder")
    if not job.source.is_file():
        raise Skipped("neither a file nor a folder")
    try:
        picture = read(job.source)
    except Exception as error:  # on broken files the decoders raise anything, from struct.error to IndexError
        raise Skipped(f"not a picture that can be read ({reason(error, job.source)})") from error
    width, height = picture.rgb.size
    prompt = ", ".join(filter(None, [args.prompt, *tags]))
    try:
        result = restored(model, picture, prompt, args.color_fix, args.scale, suffix=args.suffix, tile=args.tile,
                          instruction=args.instruction, progress=progress, **args.sampling)
    except (OSError, ValueError) as error:  # of the text encoder, which is loaded here: it concerns every picture
        raise UserError(f"{one_line(error)}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise Skipped(f"{width}×{height} needs more memory than there is; try a smaller --tile") from error
        raise
    try:
        metadata = () if args.no_metadata else (picture.icc, picture.exif)
        write(result, job.target, *metadata)
        if args.compare:
            write(picture.finish(bicubic(picture.rgb, args.scale), args.scale), job.compare, *metadata)
    except (OSError, ValueError) as error:
        raise Skipped(f"{job.target} cannot be written ({reason(error, job.target)})") from error
    return {"image": job.source.name, "from": f"{width}×{height}", "to": f"{args.scale * width}×{args.scale * height}",
            "ms": dict(model.stages), "seconds": time.perf_counter() - start, "peak_gb": peak_memory(args.device)}


def describe(row, target):
    """The line that is printed for one restored picture."""
    stages = "  ".join(f"{stage} {ms:.0f}" for stage, ms in row["ms"].items())
    peak = "" if row["peak_gb"] is None else f"  peak {row['peak_gb']:.2f} GB"
    return (f"{row['image']}  {row['from']} → {row['to']}  ms: {stages}  total {row['seconds']:.2f} s{peak}"
            f"  → {target}")


def input_tags(jobs, args, references):
    """{job: its tags} by args.tagger; empty where the tagger's weights are unavailable. Raises UserError.

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
    from photos.pairs import find_tags
    found = find_tags(args.tagger, [job.source.name for job in jobs], picture, args.device)
    return dict(zip(jobs, found, strict=True)) if found else {}


# --- scores ---

LEAK = "prompts from the references"  # marks scores that --prompt-from hr helped


def find_pairs(args, jobs):
    """[Pair] to score: the results of `jobs`, or the pictures in --sr, with their partners in --hr.

    With --sr, the inputs are only shown in the report. Raises UserError.
    """
    from metrics.score import Pair, partners
    if args.sr:
        results = [p for p in find_inputs([args.sr]) if not re.search(r"_x[124]_bicubic$", p.stem)]  # of --compare
        names = [p.name for p in results]
        if not results:
            raise UserError(f"{args.sr}: only enlargements of --compare there; rename them to score them")
    else:
        results, names = [job.target for job in jobs], [job.source.name for job in jobs]
    try:
        there = find_inputs([args.hr]) if args.hr else []
        references = partners(names, args.hr, there) if args.hr else [None] * len(names)
        if len(there) > len(names):
            print(f"note: {len(there) - len(names)} of the pictures in {args.hr} have no result", file=sys.stderr)
        if args.sr:
            shown = args.inputs and partners(names, " ".join(args.inputs), find_inputs(args.inputs))
            inputs = shown or [None] * len(names)
        else:
            inputs = [job.source for job in jobs]
    except ValueError as error:
        raise UserError(f"{error}")
    return [Pair(*pair) for pair in zip(names, results, references, inputs, strict=True)]


def score(pairs, args, note=""):
    """Score `pairs`, print the table and write --csv and --report, each with `note`. Raises UserError."""
    import weights
    from metrics.report import write_report
    from metrics.score import evaluate, print_table, write_scores
    try:
        rows = evaluate(None, pairs, args.metrics, protocol=args.protocol, device=args.device,
                        progress=lambda x: tqdm(x, desc="scoring", unit="img", disable=None))
        print_table(rows, note)
        if args.csv:
            write_scores(rows, args.csv, note)
        if args.report:
            note = ", ".join(filter(None, ["" if args.sr else str(args.model), note]))
            write_report(rows, pairs, args.report, args.protocol, note=note)
    except (OSError, ValueError, weights.Unavailable) as error:
        raise UserError(f"{one_line(error)}")


# --- measurements ---

def profile(model, args):
    """Print parameters, MACs and latency by stage. Raises UserError."""
    from lab.profile import print_profile, profile
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else (
        f"{args.device.type}, {torch.get_num_threads()} threads")
    try:
        table = profile(model, args.profile, steps=args.sampling.get("steps", 1))
    except (OSError, ValueError) as error:
        raise UserError(f"{one_line(error)}")
    print(f"{args.model}, {args.profile}×{args.profile}, {str(args.dtype).removeprefix('torch.')}, {where}")
    print_profile(table)


def stability(model, inputs, args):
    """Print how much the pictures `inputs` and their latents change under degradations. Raises UserError."""
    from lab.stability import print_stability, stability
    try:
        changes = stability(model.vae, map(read_rgb, tqdm(inputs, unit="img", disable=None)), args.seed)
    except (OSError, ValueError) as error:
        raise UserError(f"{one_line(error)}")
    print(f"{args.model}, {len(inputs)} photos, mean of ‖y' − y‖ / ‖y‖")
    print_stability(changes)


# --- the command ---

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="pictures and folders of pictures")
    add("--out", metavar="PATH", help="folder, or file for one input (default: results/<stem>_x4.png)")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="see `python -m weights` (default: embedded)")
    add("--adapter", metavar="PATH", help="LoRA weights, as written by train.py (default: the model's own, if it has "
        "any); none: the bare prior")
    add("--prompt", default="", metavar="TEXT", help="what the picture shows")
    add("--scale", type=int, choices=[1, 2, 4], default=4, help="size of the result; 1 cleans a picture that is large "
        "but spoilt, without enlarging it (default: 4)")
    add("--suffix", metavar="appendix|main|none|TEXT", help="quality words after the prompt (default: what the adapter "
        "was trained with, else appendix)")
    add("--instruction", type=Path, metavar="FILE", help="a text put before every prompt, as SANA's human instruction "
        "(default: the adapter's, else none)")
    add("--tagger", metavar="none|ram|dape|FILE.csv", default="none",
        help="finds tags for the prompt in the picture, or takes them from the columns image and tags of a file")
    add("--prompt-from", choices=["lr", "hr"], default="lr", help="where the tags come from; hr: the references, which "
        "leaks them into the result (the paper's HQ-prompt protocol read literally); scores are marked")
    add("--timestep", type=float, metavar="N", help="τ of the one update (default: the adapter's, else 900)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    add("--seed", type=int, default=0, metavar="N", help="of LinearSR's noise and of --stability; SANA-SR draws no "
        "noise: its restoration is the same for every seed")
    add("--tile", type=int, metavar="N", help="largest side, in pixels of the result, that the networks see at once "
        "(default: 1408; 0: no limit)")
    add("--fast", choices=["auto", "on", "off"], default="auto", help="the rewrites of fast/: the same result up to "
        "rounding, sooner; on a GPU with CUDA graphs (auto: on a CPU or an NVIDIA GPU)")
    add("--color-fix", choices=COLOUR_FIXES, default="none", help="colours of the enlarged input")
    add("--no-metadata", action="store_true", help="results without the input's EXIF and colour profile")
    add("--compare", action="store_true", help="write the bicubic enlargement beside the result")
    add = parser.add_argument_group("LinearSR alone, which takes many steps").add_argument
    add("--steps", type=int, metavar="N", help="evaluations of the network (default: 20)")
    add("--cfg", type=float, metavar="X", help="scale of classifier-free guidance; other than 1 it doubles the time "
        "(default: 1)")
    add("--offload", action="store_true", help="keep only the expert in use on the device")
    add = parser.add_argument_group("scores").add_argument
    add("--hr", metavar="DIR", help="references, matched by file name")
    add("--sr", metavar="DIR", help="results that exist already: nothing is restored")
    add("--metrics", metavar="LIST", help="psnr,ssim,lpips,lpips-vgg,dists,niqe,musiq,maniqa,maniqa-koniq,clipiqa or "
        "all, which leaves out lpips-vgg and maniqa-koniq (default: those without a download)")
    add("--protocol", choices=["full", "patch"], default="full", help="the whole image or its central 256×256")
    add("--csv", metavar="FILE", help="scores image by image, and a mean row")
    add("--report", metavar="FILE.html", help="a page that shows pictures and scores side by side")
    add = parser.add_argument_group("measurements").add_argument
    add("--profile", type=int, nargs="?", const=512, metavar="SIDE", help="parameters, multiply-accumulates and "
        "latency of each stage for a result of SIDE×SIDE (default: 512) and 300 text tokens; nothing is restored")
    add("--stability", action="store_true", help="how much blur, noise, JPEG and down-sampling of the INPUT photos "
        "change their latents, beside their pixels (§3.1); nothing is restored")
    args = parser.parse_args(argv)
    if args.profile is not None and (args.profile < 32 or args.profile % 32):
        parser.error(f"--profile {args.profile}: the side must be a multiple of 32")
    if not args.inputs and not args.sr and not args.profile:
        parser.error("name pictures or folders to restore, or --sr DIR to score what exists")
    if args.prompt_from == "hr" and (args.tagger not in ("ram", "dape") or not args.hr or args.sr):
        parser.error("--prompt-from hr needs pictures to restore, --tagger ram or dape, and --hr DIR")
    args.score = any([args.hr, args.sr, args.metrics, args.csv, args.report])
    if args.score and (args.profile or args.stability):
        parser.error("--profile and --stability score nothing: leave --hr, --sr, --metrics, --csv and --report out")
    if args.score:
        from metrics.score import pick
        try:
            args.metrics = pick(args.metrics, bool(args.hr))
        except ValueError as error:
            parser.error(f"--metrics: {error}")
    for folder in filter(None, (args.sr, args.hr)):
        if not Path(folder).exists():
            parser.error(f"{folder}: no such folder")
    if args.tile is not None and args.tile < 0:
        parser.error(f"--tile must not be negative: {args.tile}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    if args.timestep is not None and not 0 < args.timestep <= 1000:
        parser.error(f"--timestep must be above 0 and at most 1000, not {args.timestep:g}")
    try:
        args.instruction = args.instruction.read_text("utf-8").removesuffix("\n") if args.instruction else None
    except (OSError, ValueError) as error:
        parser.error(f"--instruction {args.instruction}: {reason(error)}")
    return args


def choose_system(args):
    """args.linear: whether --model is a LinearSR; args.sampling: what its `restore` takes that the other's does not.

    Raises UserError in one line where an option belongs to the other system.
    """
    args.linear = is_linearsr(args.model, args.dtype)
    foreign = ("adapter", "timestep") if args.linear else ("steps", "cfg", "offload")
    if given := [f"--{name}" for name in foreign if getattr(args, name) not in (None, False)]:
        what = "LinearSR, which has no adapter and no τ" if args.linear else "SANA-SR, which takes one step"
        raise UserError(f"{', '.join(given)}: {args.model} is a model of {what}; leave it out or name another --model")
    args.sampling = {"timestep": args.timestep}
    if args.linear:
        args.sampling = {"steps": args.steps or 20, "seed": args.seed, "cfg": 1.0 if args.cfg is None else args.cfg}


def load(args, fast="off"):
    """The model that the arguments name. Raises UserError in one line."""
    return load_model(args.model, args.device, args.dtype, args.adapter, fast, args.offload)


@command
def main(argv=None):
    args = parse(argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = pick_dtype(args.dtype, args.device)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", module="PIL")  # about odd files; errors are raised
    if args.sr:
        score(find_pairs(args, []), args)
        return 0
    choose_system(args)
    if args.profile:
        profile(load(args), args)
        return 0
    inputs = find_inputs(args.inputs)
    if args.stability:
        stability(load(args, args.fast), inputs, args)
        return 0
    jobs = plan(inputs, args.out, args.scale, find_inputs([args.hr]) if args.hr else [])
    pairs = find_pairs(args, jobs) if args.score else []
    if ranks > 1:  # so that all ranks end together: torchrun ends the others as soon as one rank fails
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    tags = input_tags(jobs[rank::ranks], args, {pair.sr: pair.hr for pair in pairs})
    model = load(args, args.fast)

    rows, skipped = [], []
    for job in tqdm(jobs[rank::ranks], unit="img", disable=True if len(jobs) == 1 or rank else None):  # None: on a tty
        try:
            rows.append(restore(job, model, args, tags.get(job, ()), tile_bar() if len(jobs) == 1 else None))
            tqdm.write(describe(rows[-1], job.target))
        except Skipped as reason:
            skipped.append(job.target)
            tqdm.write(" ".join(f"error: {job.source}: {reason}".split()), file=sys.stderr)  # a name may hold newlines
    if len(jobs) > 1:
        print(f"{len(rows)} restored, {len(skipped)} skipped" + (f" (rank {rank})" if ranks > 1 else ""))
    if ranks > 1:
        every = [None] * ranks
        torch.distributed.all_gather_object(every, skipped)
        skipped = sum(every, [])
    model = None  # scoring needs the memory
    pairs = [pair for pair in pairs if pair.sr not in skipped]
    if pairs and rank == 0:
        score(pairs, args, note=LEAK if tags and args.prompt_from == "hr" else "")
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
