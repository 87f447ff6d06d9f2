"""Restores pictures to four times their size.

    python eval.py lr.png                              -> results/lr_x4.png, with the model that the repository carries
    python eval.py photos/ --out restored --compare    a folder; bicubic enlargements are written beside the results
    python eval.py lr.png --model sana-600m-512 --adapter lora.safetensors --device cuda --prompt "a red brick wall"
    torchrun --nproc_per_node 4 eval.py photos/        the files are split among the ranks
    python eval.py lr/ --hr hr/ --csv scores.csv --report report.html      restores, then scores against references
    python eval.py --sr results/ --hr hr/ --metrics all                    scores pictures of any method
    python eval.py --profile                       parameters, multiply-accumulates and latency by stage
    python eval.py photos/ --stability             what degradations change in latents and in pixels (the paper's §3.1)

Reads every picture format that Pillow decodes, with EXIF orientation applied. Grey pictures come out grey, alpha is
enlarged (bicubic) and kept, 16 bits become 8, of an animation the first frame is taken. Inputs are never overwritten
and every result appears whole or not at all. A broken file among many is reported and skipped: the exit code is then 1.
It needs the packages of requirements.txt; --model embedded needs no download. `python -m weights` lists the models.

Scores are made with metrics/: the reference of a picture is the file of the same name in --hr (the endings and an _x4
may differ). Without --hr, metrics that need no reference remain. psnr, ssim, lpips and niqe need no download.
"""
import argparse
import csv
import os
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# --- pictures in ---

NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow knows these formats by name but decodes none of them


def picture_suffixes(table):
    """The lower-case suffixes of the formats in `table`: Image.OPEN for reading, Image.SAVE for writing."""
    return {s for s, f in Image.registered_extensions().items() if f in table and f not in NO_PICTURES}


@dataclass
class Picture:
    """A decoded input: what the network sees, and what must be put back afterwards."""
    rgb: Image.Image           # 8 bits, upright
    alpha: Image.Image | None  # mode L, the same size
    grey: bool
    icc: bytes | None          # the colour profile that `rgb` is still in

    @property
    def mode(self):
        return ("LA" if self.alpha else "L") if self.grey else ("RGBA" if self.alpha else "RGB")


def to_8_bit(image):
    """Modes of more than 8 bits, which Pillow's own conversion would clip: I;16… and I (0…65535), F (0…1 or 0…255)."""
    x = np.asarray(image, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("it has pixels that are not finite numbers")
    scale = 65535 if image.mode.startswith("I") else 1 if x.max() <= 1 else 255
    if x.max() > 65535:
        raise ValueError("it has pixel values of more than 16 bits")
    return Image.fromarray((x / scale * 255).clip(0, 255).round().astype(np.uint8))


def read(path):
    """Decodes `path`, a file name or a file object. Raises whatever Pillow does: OSError, ValueError, SyntaxError…"""
    with Image.open(path) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
    if 0 in image.size:
        raise ValueError("it has no pixels")
    icc = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_8_bit(image)
    elif image.mode == "LAB":  # Pillow converts it by profile only
        image = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"),
                                          outputMode="RGB")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode not in ("L", "LA", "P", "PA", "RGB", "RGBA"):
        icc = None  # CMYK, YCbCr, …: the profile does not describe the RGB made of it
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Picture(image.convert("RGB"), image.getchannel("A"), grey, icc)
    return Picture(image.convert("RGB"), None, grey, icc)


def read_rgb(path):
    """The picture `path` in RGB. Raises ValueError that names it."""
    try:
        return read(path).rgb
    except Exception as error:  # on broken files the decoders raise anything
        raise ValueError(f"{path}: not a picture that can be read ({why(error, path)})") from error


def bicubic(image):
    """Four times the size: the x_L that the network restores, and the yardstick of --compare."""
    return image.resize((4 * image.width, 4 * image.height), Image.Resampling.BICUBIC)


# --- colour correction: the result takes over the colours of the enlarged input (as StableSR does) ---

def adain(result, reference):
    """Gives each channel of `result` the mean and the deviation of `reference`. Both float32, 3,H,W."""
    def moments(x):
        deviation, mean = torch.std_mean(x.double().flatten(1), 1, correction=0)
        return mean[:, None, None].float(), (deviation[:, None, None].square() + 1e-5).sqrt().float()
    (mean, deviation), (mean_ref, deviation_ref) = moments(result), moments(reference)
    return (result - mean) / deviation * deviation_ref + mean_ref


def low_frequencies(x, levels=5):
    """What is left of the channels x: 3,H,W after smoothing by (1 2 1)/4 in both directions at steps 1, 2, 4, 8, 16."""
    for step in (2 ** i for i in range(levels)):
        for dim in (1, 2):
            n = x.shape[dim]
            around = x.index_select(dim, torch.arange(-step, n + step).clamp(0, n - 1))  # edges replicated
            x = around.narrow(dim, 0, n) / 4 + around.narrow(dim, step, n) / 2 + around.narrow(dim, 2 * step, n) / 4
    return x


def wavelet(result, reference):
    """The high frequencies of `result` on the low ones of `reference`. Both float32, 3,H,W."""
    return result - low_frequencies(result) + low_frequencies(reference)


def fix_colours(result, reference, how):
    """`result` with the colours of `reference`, 8-bit RGB pictures of one size; how: none, adain or wavelet."""
    if how == "none":
        return result
    planes = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in (result, reference)]
    fixed = {"adain": adain, "wavelet": wavelet}[how](*planes)
    return Image.fromarray((fixed * 255).round_().clamp_(0, 255).byte().permute(1, 2, 0).numpy())


# --- pictures out ---

def write(image, path, icc=None):
    """Writes `image` under a temporary name, then renames it: an interrupted run leaves no half picture."""
    options = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            image.save(f, Image.registered_extensions()[path.suffix.lower()], icc_profile=icc, **options)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Job:
    """One picture to restore."""
    source: Path
    target: Path

    @property
    def compare(self):
        return self.target.with_name(f"{self.target.stem}_bicubic{self.target.suffix}")


def find_inputs(paths):
    """The files that `paths` name, each once, folders sorted by name. Raises SystemExit for an empty folder."""
    files = {}
    known = picture_suffixes(Image.OPEN)
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir()
                            if p.suffix.lower() in known and not p.name.startswith(".") and p.is_file())
            if not inside:
                sys.exit(f"error: {path}: no pictures in this folder")
        for p in inside:
            files.setdefault(os.path.realpath(p), p)
    return list(files.values())


def plan(inputs, out=None):
    """Where each input's result goes: `out` is a file for a single input, else a folder, results/ by default.

    Inputs of one stem (a.png, a.jpg) get different results. Raises SystemExit where an input would be overwritten.
    """
    folder = Path(out or "results")
    single = None
    if out and not folder.is_dir() and not out.endswith(("/", os.sep)) and folder.suffix:
        if folder.suffix.lower() not in picture_suffixes(Image.SAVE):
            sys.exit(f"error: --out {out}: no picture format is called {folder.suffix}; end a folder's name with /")
        if len(inputs) != 1:
            sys.exit(f"error: --out {out} is one file but there are {len(inputs)} inputs: name a folder")
        single = folder
    elif folder.exists() and not folder.is_dir():
        sys.exit(f"error: --out {folder} is a file, not a folder")
    jobs, taken = [], set()
    for source in inputs:
        stem, n = source.stem, 1
        while stem.lower() in taken:  # lower: macOS and Windows tell no difference
            n += 1
            stem = f"{source.stem}-{n}"
        taken.add(stem.lower())
        jobs.append(Job(source, single or folder / f"{stem}_x4.png"))
    sources = {os.path.realpath(p) for p in inputs}
    for job in jobs:
        for target in (job.target, job.compare):
            hard_links = (p for p in inputs if target.exists() and p.exists() and target.samefile(p))
            if os.path.realpath(target) in sources or any(hard_links):
                sys.exit(f"error: the result of {job.source} would overwrite the input {target}: choose another --out")
    return jobs


# --- prompts ---

def read_tags(path):
    """{file name: tags} of a CSV file with the columns image and tags."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = csv.DictReader(f)
            if not {"image", "tags"} <= set(rows.fieldnames or ()):
                sys.exit(f"error: {path}: the first line must name the columns image and tags")
            return {Path(row["image"]).name: row["tags"] or "" for row in rows}
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {path}: {why(error, path)}")


def find_tags(jobs, args, references):
    """{job: its tags} by args.tagger; empty without one, or where its weights cannot be had. Raises SystemExit.

    A tagger is ram, dape, or a CSV file that holds them already. Tags describe the enlarged input, or with
    --prompt-from hr the reference, `references[job.target]`. The tagger lives in here alone: all pictures are tagged,
    and its memory is free, before the restorer is loaded.
    """
    if args.tagger == "none":
        return {}
    if args.tagger not in ("ram", "dape"):
        lines = read_tags(args.tagger)
        return {job: [tag.strip() for tag in lines.get(Path(job.source).name, "").split(",") if tag.strip()]
                for job in jobs}
    from tagger import open_tagger
    tags = {}
    try:
        tagger = open_tagger(args.tagger, args.device)
        for job in tqdm(jobs if tagger else [], desc="tagging", unit="img", disable=None):
            if args.prompt_from == "hr":
                tags[job] = tagger.tags(read_rgb(references[job.target]))
                continue
            try:
                image = bicubic(read_rgb(job.source))
            except (MemoryError, ValueError):  # restore() will say what is wrong with it
                tags[job] = []
            else:
                tags[job] = tagger.tags(image)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {whole(error)}")
    return tags


# --- one picture ---

def peak_memory(device):
    """Gigabytes: of GPU memory since the last picture, else of the whole process since its start; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Skipped(Exception):
    """This picture cannot be restored, others may; the message says why."""


def restore(job, model, args, tags=()):
    """Reads, restores and writes one picture. Returns what is worth reporting; raises Skipped.

    tags: what the picture shows, for the prompt.

    Raises SystemExit where the model's text encoder, which is loaded on the first new prompt, turns out broken.
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
        raise Skipped(f"not a picture that can be read ({why(error, job.source)})") from error
    enlarged = bicubic(picture.rgb)
    prompt = ", ".join(filter(None, [args.prompt, *tags]))
    try:
        result = model.restore(picture.rgb, prompt, suffix=args.suffix, timestep=args.timestep, tile=args.tile,
                               instruction=args.instruction)
        result = fix_colours(result, enlarged, args.color_fix)
    except (OSError, ValueError) as error:  # of the text encoder, which is loaded here: it concerns every picture
        sys.exit(f"error: {whole(error)}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise Skipped(f"{picture.rgb.width}×{picture.rgb.height} needs more memory than there is; "
                          "try a smaller --tile") from error
        raise

    def finish(image):  # what the network does not see: alpha, and that grey is grey
        if picture.alpha:
            image = image.copy()
            image.putalpha(bicubic(picture.alpha))
        return image if image.mode == picture.mode else image.convert(picture.mode)
    try:
        write(finish(result), job.target, picture.icc)
        if args.compare:
            write(finish(enlarged), job.compare, picture.icc)
    except (OSError, ValueError) as error:
        raise Skipped(f"{job.target} cannot be written ({why(error, job.target)})") from error
    return {"image": job.source.name, "width": picture.rgb.width, "height": picture.rgb.height, "prompt": prompt,
            "ms": dict(model.stages), "seconds": time.perf_counter() - start, "peak_gb": peak_memory(args.device)}


def whole(error):
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def why(error, path=""):
    """An exception in one line, without the file name `path`, which the message around it already has."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return whole(error).replace(f" {str(path)!r}", "").replace(f" '{os.path.realpath(path)}'", "")


def describe(row, target):
    """The line that is printed for one restored picture."""
    w, h = row["width"], row["height"]
    stages = "  ".join(f"{stage} {ms:.0f}" for stage, ms in row["ms"].items())
    peak = "" if row["peak_gb"] is None else f"  peak {row['peak_gb']:.2f} GB"
    return f"{row['image']}  {w}×{h} → {4 * w}×{4 * h}  ms: {stages}  total {row['seconds']:.2f} s{peak}  → {target}"


# --- scores ---

LEAK = "prompts from the references"  # marks scores that --prompt-from hr helped


def find_pairs(args, jobs):
    """What is to be scored: Pairs of the results of `jobs`, or of the pictures in --sr, with their partners in --hr.
    With --sr, the inputs are only shown in the report. Raises SystemExit."""
    from metrics.score import Pair, partners
    if args.sr:
        results = [p for p in find_inputs([args.sr]) if not p.stem.endswith("_x4_bicubic")]  # made by --compare
        names = [p.name for p in results]
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
        sys.exit(f"error: {error}")
    return [Pair(*pair) for pair in zip(names, results, references, inputs, strict=True)]


def score(pairs, args, note=""):
    """Scores `pairs`, prints the table and writes --csv and --report, each with `note`. Raises SystemExit."""
    import weights
    from metrics.report import write_report
    from metrics.score import print_table, score, write_csv
    try:
        rows = score(pairs, args.metrics, args.protocol, args.device, read_rgb,
                     lambda x: tqdm(x, desc="scoring", unit="img", disable=None))
        print_table(rows, note)
        if args.csv:
            write_csv(rows, args.csv, note)
        if args.report:
            note = ", ".join(filter(None, ["" if args.sr else str(args.model), note]))
            write_report(rows, pairs, args.report, read_rgb, args.protocol, note=note)
    except (OSError, ValueError, weights.Unavailable) as error:
        sys.exit(f"error: {whole(error)}")


# --- measurements ---

def profile(model, args):
    """Prints parameters, MACs and latency by stage. Raises SystemExit."""
    from metrics.profile import print_profile, profile
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else (
        f"{args.device.type}, {torch.get_num_threads()} threads")
    try:
        table = profile(model, args.profile)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {whole(error)}")
    print(f"{args.model}, {args.profile}×{args.profile}, {str(args.dtype).removeprefix('torch.')}, {where}")
    print_profile(table)


def stability(model, inputs, args):
    """Prints how much the pictures `inputs` and their latents change under degradations. Raises SystemExit."""
    from metrics.stability import print_stability, stability
    try:
        changes = stability(model.vae, map(read_rgb, tqdm(inputs, unit="img", disable=None)), args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {whole(error)}")
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
    add("--suffix", default="appendix", metavar="appendix|main|none|TEXT", help="quality words after the prompt")
    add("--instruction", type=Path, metavar="FILE", help="a text put before every prompt, as SANA's human instruction")
    add("--tagger", metavar="none|ram|dape|FILE.csv", default="none",
        help="finds tags for the prompt in the picture, or takes them from the columns image and tags of a file")
    add("--prompt-from", choices=["lr", "hr"], default="lr", help="where the tags come from; hr: the references, which "
        "leaks them into the result (the paper's HQ-prompt protocol read literally); scores are marked")
    add("--timestep", type=float, metavar="N", help="τ of the one update (default: the adapter's, else 900)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    add("--seed", type=int, default=0, metavar="N", help="of --stability; a restoration draws no noise: it is the same "
        "for every seed")
    add("--tile", type=int, metavar="N", help="largest side, in pixels of the result, that the networks see at once "
        "(default: 1408; 0: no limit)")
    add("--plain", action="store_true", help="sanasr.py as it stands, without the rewrites of fast.py: the same up to "
        "rounding, slower; so it is always on a GPU, where they are not measured")
    add("--color-fix", choices=["none", "adain", "wavelet"], default="none", help="colours of the enlarged input")
    add("--compare", action="store_true", help="write the bicubic enlargement beside the result")
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
    if args.timestep is not None and not 0 < args.timestep <= 1000:
        parser.error(f"--timestep must be above 0 and at most 1000, not {args.timestep:g}")
    try:
        args.instruction = args.instruction.read_text("utf-8").removesuffix("\n") if args.instruction else ""
    except (OSError, ValueError) as error:
        parser.error(f"--instruction {args.instruction}: {why(error)}")
    return args


def pick_device(name, local_rank=0):
    """The torch.device for cpu, cuda, mps or auto (the best there is). Raises SystemExit for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n in there if there[n])
    if not there[name]:
        sys.exit(f"error: --device {name}: PyTorch {torch.__version__} finds none here; use --device cpu")
    return torch.device(name, local_rank % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def pick_dtype(name, device):
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # older cards emulate it
        name = "bf16" if native else "fp32"
    return DTYPES[name]


def load_model(args):
    """SanaSR from --model and --adapter. Raises SystemExit in one line."""
    import weights
    from sanasr import SanaSR
    try:
        folder = weights.folder(args.model, args.dtype)
        adapter = False if args.adapter == "none" else args.adapter
        if adapter and not Path(adapter).is_file():
            sys.exit(f"error: --adapter {adapter}: no such file")
        model = SanaSR.from_pretrained(folder, device=args.device, dtype=args.dtype, adapter=adapter)
    except (OSError, ValueError, weights.Unavailable) as error:
        sys.exit(f"error: {whole(error)}")
    if args.device.type == "cpu" and not (args.plain or args.profile):  # the profile counts the plain path
        import fast
        fast.optimise(model)
        fast.keep_memory()
    return model


def main(argv=None):
    args = parse(argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = pick_dtype(args.dtype, args.device)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", module="PIL")  # on odd files; what matters is raised
    if args.sr:
        score(find_pairs(args, []), args)
        return 0
    if args.profile:
        profile(load_model(args), args)
        return 0
    inputs = find_inputs(args.inputs)
    if args.stability:
        stability(load_model(args), inputs, args)
        return 0
    jobs = plan(inputs, args.out)
    pairs = find_pairs(args, jobs) if args.score else []
    if ranks > 1:  # only to leave together: torchrun ends the others as soon as one rank fails
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    tags = find_tags(jobs[rank::ranks], args, {pair.sr: pair.hr for pair in pairs})
    model = load_model(args)

    rows, skipped = [], []
    for job in tqdm(jobs[rank::ranks], unit="img", disable=True if len(jobs) == 1 or rank else None):  # None: on a tty
        try:
            rows.append(restore(job, model, args, tags.get(job, ())))
            tqdm.write(describe(rows[-1], job.target))
        except Skipped as reason:
            skipped.append(job.target)
            tqdm.write(f"error: {job.source}: {reason}", file=sys.stderr)
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
