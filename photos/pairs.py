"""Photos to train on: scanning folders, real LR pairs, the hold-out rule, training pairs, tags.

    photos, report = scan(["./hq"], crop=512, index="runs/x/data.json", workers=4)
    photos, held = split(photos)                       the held-out ones are never trained on
    Pairs(photos, prompts, …)[n]                       sample n of the endless stream of training pairs
    find_tags("ram", photos, picture)                  the tags of each photo, for its prompt
"""
import csv
import hashlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset
from tqdm import tqdm

import weights
from photos.degrade import SCALE, degrade, enlarge, sharpen, to_image, to_tensor
from photos.pictures import bicubic, picture_suffixes, png, read, reason, write_bytes
from photos.tagger import Tagger
from runs import UserError, from_first
from sanasr import build_prompt, clean_tags

# --- Finding photos ---


class Photo(NamedTuple):
    """A file that was read once from end to end; size and time tell later whether it is still the same."""
    path: str
    bytes: int
    mtime_ns: int
    sha256: str
    width: int
    height: int


def inspect(path):
    """Path -> Photo, or None where the file is no picture that can be decoded."""
    try:
        stat, data = path.stat(), path.read_bytes()
        rgb = read(BytesIO(data)).rgb
    except Exception:  # on broken files the decoders raise anything
        return None
    return Photo(str(path), stat.st_size, stat.st_mtime_ns, hashlib.sha256(data).hexdigest(), *rgb.size)


def photo_paths(folders):
    """All files below the folders with a picture's suffix, hidden ones left out, sorted. A link keeps its own name.

    Raises UserError for a folder that is missing.
    """
    suffixes, paths = picture_suffixes(Image.OPEN), set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"--data {folder}: no such folder")
        paths |= {Path(os.path.abspath(p)) for p in folder.rglob("*")
                  if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()}
    return sorted(paths)


def scan(folders, crop, index, workers):
    """All different photos of at least crop x crop below the folders, in the order of their hashes, and the report.

    index: a JSON file that remembers what was read, so that a second scan reads only new files.
    Raises UserError where a folder is missing or nothing is left.
    """
    try:
        known = {row[0]: Photo(*row) for row in json.loads(index.read_text())}
    except (OSError, ValueError, TypeError, IndexError, KeyError):  # there is none, or it is damaged: made anew
        known = {}
    paths = photo_paths(folders)

    def look(path):
        old, stat = known.get(str(path)), path.stat()
        return old if old and (old.bytes, old.mtime_ns) == (stat.st_size, stat.st_mtime_ns) else inspect(path)

    with ThreadPoolExecutor(max(workers, 1)) as pool:  # decoding and hashing leave the interpreter lock
        found = list(tqdm(pool.map(look, paths), "reading photos", len(paths), leave=False, disable=len(paths) < 100))
    readable = [p for p in found if p]
    write_bytes(index, json.dumps(readable))
    distinct = sorted({p.sha256: p for p in reversed(readable)}.values(), key=lambda p: p.sha256)
    photos = [p for p in distinct if min(p.width, p.height) >= crop]
    report = (f"{len(photos)} photos of {len(paths)} files; skipped: {len(readable) - len(distinct)} duplicates, "
              f"{len(paths) - len(readable)} unreadable, {len(distinct) - len(photos)} smaller than {crop} pixels")
    if not photos:
        raise UserError(f"--data {' '.join(map(str, folders))}: {report}")
    return photos, report


# --- The hold-out rule, the same for every stage of training and pruning ---


def held_out(hashes):
    """The SHA-256 digests, of the photos' digests in hexadecimal, that are never trained on: a second digit of 0.

    That is one photo in 16, whatever its name, folder or neighbours. A set so small that this holds out none (or all)
    holds out its smallest digests instead: one in 16, at least one. A single photo is not held out.
    """
    hashes = set(hashes)
    held = {h for h in hashes if h[1] == "0"}
    if 0 < len(held) < len(hashes):
        return held
    return set(sorted(hashes)[:max(1, len(hashes) // 16)]) if len(hashes) > 1 else set()


def split(photos):
    """[Photo] -> (those to train on, those held out), both in the order given."""
    held = held_out(p.sha256 for p in photos)
    return [p for p in photos if p.sha256 not in held], [p for p in photos if p.sha256 in held]


def digest(photos):
    """One hash for a list of photos, in their order."""
    return hashlib.sha256("".join(p.sha256 for p in photos).encode()).hexdigest()


def hash_of(texts):
    """One SHA-256 for a list of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


# --- Real LR pictures ---


def bare_name(path):
    """What a photo and its real LR picture share: the file name without suffix and without _HR, _LR, _LR4."""
    return re.sub(r"_(HR|LR\d?)$", "", Path(path).stem, flags=re.IGNORECASE)


def match_lq(photos, folder):
    """{path of a photo: path of its LR picture in `folder`}. Raises UserError for a pair that is not 1 : 4."""
    suffixes, large, small, pairs = picture_suffixes(Image.OPEN), {}, {}, {}  # large, small: {bare name: [paths]}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in suffixes:
            small.setdefault(bare_name(path), []).append(str(path))
    for photo in photos:
        large.setdefault(bare_name(photo.path), []).append(photo.path)
    for photo in (p for p in photos if bare_name(p.path) in small):
        for same in (large[bare_name(photo.path)], small[bare_name(photo.path)]):
            if len(same) > 1:
                raise UserError(f"--lq {folder}: {same[0]} and {same[1]} have the same name; rename one")
        pairs[photo.path] = path = small[bare_name(photo.path)][0]
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            width, height = image.size[::-1] if turned else image.size
        if (width * SCALE, height * SCALE) != (photo.width, photo.height):
            raise UserError(f"{path} is {width}x{height}, but {photo.path} is {photo.width}x{photo.height}, "
                            f"not {SCALE} times that")
    if not pairs:
        raise UserError(f"--lq {folder}: no picture there has the name of a photo")
    return pairs


# --- Training and validation pairs ---

TILE = 1024  # pixels of a tile of --cache, more where a crop is over half of it


class Pairs(Dataset):
    """Sample n of the endless stream of training pairs: photo `order[n]` of epoch n // len(photos).

    A sample is a function of (seed, epoch, photo): the same for any number of workers, ranks and restarts. It also
    carries what Algorithm 1 draws for it, t and ε.
    """

    def __init__(self, photos, prompts, crop, latent, t_range, seed, lq=None, usm=False, mild=0.0, cache=None):
        self.photos, self.prompts, self.lq, self.mild, self.cache = photos, prompts, lq or {}, mild, cache
        self.crop, self.latent, self.t_range, self.seed, self.usm = crop, latent, t_range, seed, usm
        self.epoch = None, None

    def place(self, n):
        """n -> (epoch, index of the photo): every epoch takes each photo once, in an order of its own."""
        epoch, position = divmod(n, len(self.photos))
        if self.epoch[0] != epoch:
            self.epoch = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.photos))
        return epoch, int(self.epoch[1][position])

    def sample(self, n):
        """-> (index of the photo, generator for what else is drawn, LR and HR pictures: 3,h,w and 3,H,W in [0, 1])."""
        epoch, i = self.place(n)
        rng = np.random.default_rng((self.seed, epoch, i))
        photo, crop = self.photos[i], self.crop
        left, top = (int(rng.integers((size - crop) // SCALE + 1)) * SCALE for size in (photo.width, photo.height))
        hr, lr = crop_pair(photo, self.lq.get(photo.path), left, top, crop, self.cache)
        if rng.random() < 0.5:
            hr, lr = hr.flip(-1), None if lr is None else lr.flip(-1)
        hr = sharpen(hr) if self.usm else hr
        return i, rng, degrade(hr, rng, mild=self.mild) if lr is None else lr, hr

    def __getitem__(self, n):
        i, rng, lr, hr = self.sample(n)
        low, high = self.t_range
        return {"x_L": enlarge(lr), "x_H": hr * 2 - 1, "t": np.float32(rng.integers(low, high, endpoint=True)),
                "noise": rng.standard_normal(self.latent, dtype=np.float32),
                "prompt": self.prompts[i], "name": self.photos[i].path, "shift": rng.integers(32, size=2)}


def crop_pair(photo, lq_path, left, top, crop, cache=None):
    """(hr, lr): 3,crop,crop in [0, 1] and the same part of the real LR picture, or None without one."""
    def cut(path, left, top, crop):
        return to_tensor(read(path).rgb.crop((left, top, left + crop, top + crop)))
    try:
        hr = cut(*(tile(photo, left, top, crop, cache) if cache else (photo.path, left, top)), crop)
        lr = cut(lq_path, left // SCALE, top // SCALE, crop // SCALE) if lq_path else None
    except Exception as error:  # it could be read when the run began; of a loader only the last line is shown
        tiles = f", nor its tiles in --cache {cache} read or written" if cache else ""
        raise OSError(f"{photo.path} (or its LR picture) can no longer be read{tiles}: {reason(error)}") from error
    return hr, lr


def tile(photo, left, top, crop, cache):
    """(path, left, top): a tile in the folder `cache`, and where a crop of the photo lies in it.

    Tiles overlap by a crop, so each crop lies in one. A photo's are cut when the first of them is asked for, and named
    by its hash.
    """
    side = max(TILE, 2 * crop)
    stride = side - crop

    def name(x, y):
        return Path(cache) / photo.sha256[:2] / f"{photo.sha256}_{side}_{stride}_{x}_{y}.png"
    x, y = left // stride * stride, top // stride * stride
    if not name(x, y).exists():
        image = read(photo.path).rgb
        for across in range(0, photo.width - crop + 1, stride):
            for down in range(0, photo.height - crop + 1, stride):
                right, bottom = min(across + side, photo.width), min(down + side, photo.height)
                write_bytes(name(across, down), png(image.crop((across, down, right, bottom))))
    return name(x, y), left - x, top - y


def validation_pairs(photos, lq, crop, seed, folder, mild=0.0):
    """[(name, LR image, HR image)] of the photos' central crops, the same in every run; also written to `folder`."""
    pairs = []
    for i, photo in enumerate(photos):
        left, top = ((size - crop) // 2 // SCALE * SCALE for size in (photo.width, photo.height))
        hr, lr = crop_pair(photo, lq.get(photo.path), left, top, crop)
        lr = degrade(hr, (seed, 2 ** 32 - 1, i), mild=mild) if lr is None else lr  # an epoch that no training reaches
        pairs.append((f"{i:02d}_{bare_name(photo.path)}.png", to_image(lr), to_image(hr)))
    if folder:
        names = {name for name, *_ in pairs}
        for old in folder.glob("[lh]r/[0-9][0-9]*_*.png"):  # of other photos, by the names that are given here
            if old.name not in names:
                old.unlink()
        for name, lr, hr in pairs:
            write_bytes(folder / "lr" / name, png(lr))
            write_bytes(folder / "hr" / name, png(hr))
    return pairs


# --- Tags ---


def read_tags(path):
    """{file name: [tags]} of a CSV file with the columns image and tags, words of degradation left out.

    Raises UserError in one line.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:  # -sig: Excel puts a byte order mark first
            rows = csv.DictReader(f)
            if not {"image", "tags"} <= set(rows.fieldnames or ()):
                raise UserError(f"{path}: the first line must name the columns image and tags")
            found = {}
            for row in filter(lambda row: row["image"], rows):
                name = Path(row["image"]).name
                tags = clean_tags(filter(None, map(str.strip, (row["tags"] or "").split(","))))
                if found.setdefault(name, tags) != tags:
                    raise UserError(f"{path}: two pictures are called {name} and have different tags; rename one")
            return found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {reason(error, path)}")


def find_tags(kind, names, picture, device=None):
    """[[tags of a picture], …] for pictures called `names`. Without the tagger's weights None, and a line on stderr.

    kind: none, ram, dape, or a CSV file. picture(i): the RGB picture i that a tagger looks at, or None for no tags.
    device: the tagger's, by default a GPU where there is one. The tagger is gone when this returns.
    Raises UserError, and ValueError for broken weights of the tagger.
    """
    if kind == "none":
        return [[] for _ in names]
    if kind not in ("ram", "dape"):
        tags = read_tags(kind)
        return [tags.get(Path(name).name, []) for name in names]
    if not names:
        return []
    try:
        tagger = Tagger.from_pretrained(kind, device)
    except weights.Unavailable as error:
        print(f"no tags, the prompt is the quality suffix alone: {error}", file=sys.stderr)
        return None
    seen = (picture(i) for i in tqdm(range(len(names)), "tagging", unit="img", disable=None))
    return [tagger.tags(image) if image else [] for image in seen]


def photo_tags(kind, protocol, photos, lq, cache):
    """The tags of each training photo, [[tag, …], …]; None where the tagger's weights are unavailable.

    They describe x_H in the hq protocol and x_L in the lq protocol: the whole photo's LR picture, enlarged; where no
    real one exists it is made by the degradation seeded with the photo's hash.
    cache: a JSON file of what a tagger found before, by photo, tagger and the picture it looked at.
    """
    names = [Path(p.path).name for p in photos]
    if kind not in ("ram", "dape"):
        tags = find_tags(kind, names, None)
        if missing := sum(not line for line in tags) if kind != "none" else 0:
            print(f"--tags {kind}: {missing} of {len(names)} photos have no line there and get no tags")
        return tags

    def seen(photo):  # which picture the tagger looks at
        if protocol == "hq":
            return "x_H"
        return f"x_L {weights.sha256(lq[photo.path])}" if photo.path in lq else "x_L"
    keys = [" ".join((p.sha256, kind, seen(p))) for p in photos]
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    new = [i for i, key in enumerate(keys) if key not in known]
    if new:
        found = find_tags(kind, [names[i] for i in new],
                          lambda n: tagger_input(photos[new[n]], lq.get(photos[new[n]].path), protocol))
        if found is None:
            return None
        known |= {keys[i]: tags for i, tags in zip(new, found, strict=True)}
        write_bytes(cache, json.dumps(known))
    return [known[key] for key in keys]


def tagger_input(photo, lq_path, protocol):
    """The picture that the tags of a training photo come from."""
    image = read(photo.path).rgb
    if protocol == "hq":
        return image
    if lq_path:
        return bicubic(read(lq_path).rgb, SCALE)
    hr = to_tensor(image.crop((0, 0, image.width // SCALE * SCALE, image.height // SCALE * SCALE)))
    return bicubic(to_image(degrade(hr, int(photo.sha256[:16], 16))), SCALE)


# --- All of that, as a training begins with it ---


class TrainingData:
    """Photos and their prompts, the held-out validation pairs and theirs.

    photos: [Photo], to train on; lq: {photo: its LR picture}; prompts: of the photos, with their `tags`;
    pairs: [(name, LR image, HR image)], val_prompts: theirs, of x_L, as at test time; report: one line;
    fingerprints: what a resumed run compares.
    """

    def __init__(self, args, folder, protocol="lq", min_side=0, val_folder=None, pairs_seed=None):
        """args: those of `add_data_options`, with crop and suffix filled in. folder: keeps the scan and the tags.

        Where the tagger's weights are unavailable, args.tags becomes none. With several ranks the first one looks.
        """
        def look():
            photos, report = scan(args.data, max(args.crop, min_side), folder / "data.json", args.workers)
            photos, held = split(photos)
            lq = match_lq(photos + held, args.lq) if args.lq else {}
            tags = photo_tags(args.tags, protocol, photos, lq, folder / "tags.json")
            seed = args.seed if pairs_seed is None else pairs_seed
            pairs = validation_pairs(held[:args.val], lq, args.crop, seed, val_folder, getattr(args, "mild", 0.0))
            names = [photo.path for photo in held[:args.val]]
            val_tags = find_tags(args.tags, names, lambda i: bicubic(pairs[i][1])) if tags else None
            report += f"; {len(held)} held out, {len(pairs)} for validation"
            report += f"; {len(lq)} have real LR pictures" if lq else ""
            return photos, lq, tags, pairs, val_tags, report
        self.photos, self.lq, tags, self.pairs, val_tags, self.report = from_first(look)
        if tags is None:  # the tagger's weights are unavailable
            args.tags = "none"
        self.tags = tags or [[] for _ in self.photos]
        self.prompts = [build_prompt(line, args.suffix) for line in self.tags]
        self.val_prompts = [build_prompt(line, args.suffix) for line in val_tags or [[]] * len(self.pairs)]
        self.fingerprints = {
            "the photos": digest(self.photos), "the tags": hash_of(self.prompts), "the LR pictures": hash_of(
                [weights.sha256(Path(self.lq[p.path])) if p.path in self.lq else "" for p in self.photos])}


def add_data_options(add, tags="ram; none for the bundled model", suffix="the adapter's, else appendix"):
    """The options that `TrainingData` reads, by a parser's or group's `add_argument`. tags, suffix: the defaults, told.
    """
    add("--data", nargs="+", metavar="DIR", help="folders of photos, searched recursively")
    add("--lq", metavar="DIR", help="real LR pictures of the same names, a quarter of the size")
    add("--crop", type=int, help="pixels (default: what the model was trained at, 512 for SANA-0.6B)")
    add("--tags", metavar="none|ram|dape|FILE.csv", help="of the photos: none, by a tagger, or from the columns image "
        f"and tags of a file (default: {tags})")
    add("--suffix", metavar="appendix|main|none|TEXT", help=f"quality words after the tags (default: {suffix})")
    add("--val", type=int, default=8, metavar="N", help="validate on the first N of the photos that are held out: one "
        "in 16, by the hash of the file")


def absolute(args):
    """Make the paths among the data options absolute: a resumed run may start elsewhere."""
    args.data = args.data and [str(Path(folder).resolve()) for folder in args.data]
    for option in ("lq", "tags", "init", "cache", "teacher", "adapter"):
        if getattr(args, option, None) not in (None, "none", "ram", "dape"):
            setattr(args, option, str(Path(getattr(args, option)).resolve()))
