"""Scores folders of pictures: pairs by file name, one protocol, a table, a CSV. eval.py is its command."""
import re
import sys
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import fmean

import torch

import weights
from metrics import METRICS, load
from photos.pictures import central, find_inputs, read_picture, read_rgb, restored, to_tensor
from runs import set_flags, write_csv

PATCH = 256  # side of the central crop of the protocol `patch`


@dataclass(frozen=True)
class Pair:
    """One picture to score. sr: the result, lr: what it is made from, hr: its reference; None where there is none."""
    name: str
    sr: Path | None
    hr: Path | None = None
    lr: Path | None = None


def partners(names, folder, files):
    """The file of `files` that belongs to each of `names`: of the same name, else of the same stem, with or without
    the `_x4` (`_x1`, `_x2`) that eval.py appends. Raises ValueError that names what is missing or ambiguous."""
    def stem(name):
        return re.sub(r"_x[124]$", "", Path(name).stem)
    by_name, by_stem = {}, {}
    for f in files:
        by_name.setdefault(f.name, []).append(f)
        by_stem.setdefault(stem(f.name), []).append(f)
    found, missing = [], []
    for name in names:
        candidates = by_name.get(name) or by_stem.get(stem(name), [])
        if len(candidates) > 1:
            raise ValueError(f"{folder}: {name} has several partners: " + ", ".join(map(str, candidates)))
        found += candidates
        missing += [] if candidates else [name]
    if missing:
        raise ValueError(f"{folder}: no partner for " + ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
                         + f" ({len(missing)} of {len(names)} pictures; they are matched by file name)")
    if len(set(found)) < len(found):
        twice = next(f for f in found if found.count(f) > 1)
        raise ValueError(f"{folder}: {twice.name} is the partner of several pictures")
    return found


def folder_pairs(lr, hr):
    """[Pair] of the pictures in folder `lr`, to be restored, with their partners in folder `hr`. Raises ValueError."""
    inputs = find_inputs([lr])
    references = partners([path.name for path in inputs], hr, find_inputs([hr]))
    return [Pair(path.name, None, reference, path) for path, reference in zip(inputs, references, strict=True)]


def pick(text, has_reference):
    """Metric names out of `text`: a comma-separated list, `all` (the usual ones), or None for those of them that need
    no download. Without a reference, `all` and None stand for the no-reference metrics. Raises ValueError."""
    if text is None or text.strip().lower() == "all":
        return [name for name, m in METRICS.items()
                if m.usual and (text or not m.download) and (has_reference or not m.needs_reference)]
    names = list(dict.fromkeys(n.strip().lower() for n in text.split(",") if n.strip()))
    if unknown := [n for n in names if n not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(unknown)}; known are {', '.join(METRICS)} and all")
    if not names:
        raise ValueError(f"no metric named; known are {', '.join(METRICS)} and all")
    if not has_reference and (needy := [n for n in names if METRICS[n].needs_reference]):
        raise ValueError(f"{', '.join(needy)}: these need the references, --hr DIR")
    return names


def crop(image, protocol):
    """The part of a PIL image that counts: all of it (`full`), or the central 256x256 (`patch`)."""
    return image if protocol == "full" else central(image, PATCH)


def load_all(names, device):
    """{name: the metric's function}. One whose weights are unavailable is left out with a line on stderr.

    Raises weights.Unavailable where none is left.
    """
    functions, reason = {}, None
    for name in names:
        try:
            functions[name] = load(name, device)
        except weights.Unavailable as error:
            reason = error
            print(f"skipped {name}: {error}", file=sys.stderr)
    if not functions:
        raise reason
    return functions


def evaluate(model, pairs: list, names: list, *, protocol: str = "full", device="cpu", prompts: list | None = None,
             scale: int = 4, progress=iter, **options) -> list[dict]:
    """Restore the input of every pair with `model` and score the results: [{"image": name, metric: float, …}, …].

    model: anything with restore(image, prompt, scale=…, **options); None scores the pictures `Pair.sr` that exist.
    pairs: [Pair], with `lr` to restore or `sr` to score. names: of metrics, see `pick`. prompts: one for each pair.
    options: go to model.restore. progress: wraps the iteration, as tqdm does.
    Metrics: see `load_all`; NaN where a picture is too small for one. Raises ValueError for pairs that do not fit or
    cannot be read, weights.Unavailable where no metric is left.
    """
    set_flags()  # a training in this process, before, has set others
    functions, rows = load_all(names, device), []
    for pair, prompt in zip(progress(pairs), prompts or [""] * len(pairs), strict=True):
        if model is None:
            sr = read_rgb(pair.sr)
        else:
            sr = restored(model, read_picture(pair.lr), prompt, scale=scale, **options).convert("RGB")
        hr = read_rgb(pair.hr) if pair.hr else None
        size = f"{pair.sr or f'the result of {pair.lr}'} is {sr.width}×{sr.height}"
        if hr and sr.size != hr.size:
            raise ValueError(f"{size} but its reference {pair.hr} is {hr.width}×{hr.height}")
        if protocol == "patch" and min(sr.size) < PATCH:
            raise ValueError(f"{size}, too small for --protocol patch ({PATCH}×{PATCH})")
        x, y = (to_tensor(crop(t, protocol))[None].contiguous(memory_format=torch.channels_last) if t else None
                for t in (sr, hr))
        row = {"image": pair.name}
        for name, function in functions.items():
            try:
                row[name] = function(x, y).item()
            except ValueError as error:  # a picture too small for it; the others have their scores
                print(f"note: {pair.sr or pair.lr}: {error}", file=sys.stderr)
                row[name] = nan
        rows.append(row)
    return rows


def mean(rows):
    """The mean row: of each metric the mean over the images that have it. NIQE is NaN for a picture of one colour."""
    return {"image": "mean"} | {n: fmean([r[n] for r in rows if not isnan(r[n])] or [nan]) for n in list(rows[0])[1:]}


def shown(name, value):
    """The score `value` of the metric `name`, as tables show it."""
    return f"{value:.{METRICS[name].decimals}f}"


def print_table(rows, note=""):
    """Image by image and the mean, then what the mean leaves out and the note. Arrows say which way is better."""
    names = list(rows[0])[1:]
    table = [["", *(f"{n} {METRICS[n].arrow}" for n in names)],
             *([r["image"], *(shown(n, r[n]) for n in names)] for r in [*rows, mean(rows)])]
    wide, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    head, *each, last = ("  ".join([image.ljust(wide), *map(str.rjust, cells, widths)]) for image, *cells in table)
    print(head, "-" * len(head), *each, "-" * len(head), last, sep="\n")
    for n in names:
        if lacking := sum(isnan(r[n]) for r in rows):
            print(f"{n}: {lacking} of {len(rows)} pictures have none; the mean is that of the others")
    if note:
        print(note)


def write_scores(rows, path, note=""):
    """image, metrics with 6 decimals; the last row is the mean. A note stands in every row, in a last column `note`."""
    extra = {"note": note} if note else {}
    write_csv(path, [*rows[0], *extra], [row | extra for row in [*rows, mean(rows)]], ".6f", "\n")
