"""Where weights come from: the table of known models and files, and how each becomes a path on this machine.

    folder("embedded")              -> the folder of a whole model in the official layout
    folder("sana-600m-512", "bf16") -> the same, downloaded on first use: one whole set of weight files, no more
    file("musiq-koniq")             -> a single file of weights (metrics, tagger)
    python -m weights               -> what is known, and what is present

The order of search, for both:
    1. the folder named by the environment variable SANASR_WEIGHTS (for machines without a network). A model is there
       under its name or its repository's, a single file under its file name. Under its name, a file is not checked, so
       it may be a smaller copy: vgg16.safetensors with the `features.*` of VGG16 in float16 is 29 MB and works as well.
    2. this folder, for what is bundled
    3. the Hugging Face cache (HF_HOME, HF_HUB_CACHE), without a request to the network
    4. the Hugging Face Hub, unless HF_HUB_OFFLINE=1. A broken transfer is resumed; complete files are kept.

Beside this: weights.files reads and writes networks, weights.configs checks their config.json, weights.dtypes chooses
the dtype. A new model or file is one line in MODELS or FILES.
"""
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("transformer", "vae", "text_encoder")  # the folders that hold config.json and weights; tokenizer/ has neither


class Unavailable(RuntimeError):
    """Known weights that are unavailable here and now; the message, one line, says what to do."""


@dataclass(frozen=True)
class Model:
    """A whole model: transformer/, vae/, text_encoder/, tokenizer/, or what linearsr/ reads. Without `repo` it is
    bundled in weights/."""
    licence: str
    repo: str | None = None
    revision: str = "main"
    gigabytes: float = 0.0  # of the plain set, to warn before a download


@dataclass(frozen=True)
class File:
    """One file. `sha256` may be given by its first digits."""
    filename: str
    licence: str
    repo: str
    sha256: str
    megabytes: float
    revision: str = "main"


_SANA = "NVIDIA Source Code License NSCL v2-custom, non-commercial; text encoder: Gemma Terms of Use"
MODELS = {
    "embedded": Model("this project's own, see weights/embedded/README.md"),
    "linearsr-embedded": Model("this project's own, see weights/linearsr-embedded/README.md"),
    "sana-600m-512": Model(_SANA, "Efficient-Large-Model/Sana_600M_512px_diffusers", gigabytes=8.9),
    "sana-600m-1024": Model(_SANA, "Efficient-Large-Model/Sana_600M_1024px_diffusers", gigabytes=8.9),
    "sana-1600m-1024": Model(_SANA, "Efficient-Large-Model/Sana_1600M_1024px_diffusers", gigabytes=12.9),
}

_IQA, _NC = "chaofengc/IQA-PyTorch-Weights", "CC BY-NC-SA 4.0 (collection); the authors' own terms apply"
FILES = {
    # The classification weights of torchvision and OpenAI, as safetensors.
    "vgg16": File("model.safetensors", "BSD-3-Clause", "timm/vgg16.tv_in1k", megabytes=553,
                  revision="b8d8aa2dd860af9233c8c67385a8097fd6c35d3f",
                  sha256="57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8"),
    "clip-rn50": File("open_clip_model.safetensors", "MIT", "timm/resnet50_clip.openai", megabytes=408,
                      revision="ec3d92cf63a5f9d591f0d611b736895966c73076",
                      sha256="da0baa37fb2211eee5729ab69ed587eb10d48f5b7076ceeed01552fc3d4cb4ee"),
    # Pickled checkpoints of tensors only: read with torch.load(weights_only=True).
    "musiq-koniq": File("musiq_koniq_ckpt-e95806b9.pth", _NC, _IQA, megabytes=109,
                        sha256="e95806b9eae5f3814c410f574ba8e552362bd5bc63d758ed5b97860f5d6185aa"),
    "maniqa-pipal": File("MANIQA_PIPAL-ae6d356b.pth", _NC, _IQA, sha256="ae6d356b", megabytes=543),
    "maniqa-koniq": File("ckpt_koniq10k.pt", _NC, _IQA, megabytes=543,
                         sha256="a207f8ab57322e6be38ff5c8d019301dc032b454bef21c3c9f9dbf7974eebff6"),
    # The tagger's; `python -m photos.tagger --convert` makes a small copy of the first one.
    "ram": File("ram_swin_large_14m.pth", "Apache-2.0", "xinyu1205/recognize_anything_model", megabytes=5626,
                sha256="15c729c793af28b9d107c69f85836a1356d76ea830d4714699fb62e55fcc08ed"),
    "dape": File("DAPE.pth", "Apache-2.0", "CSWRY/SeeSR", megabytes=7.2,
                 sha256="a7028be2edcbe9ab0bd1c4ab6f2a2a86f4b44d32261a4faa50ae10fdd9b2feba"),
}


def cache_dir():
    """Where what was computed once is kept (text states, tags): $SANASR_CACHE, by default ~/.cache/sanasr."""
    return Path(os.environ.get("SANASR_CACHE") or "~/.cache/sanasr").expanduser()


# --- which files of a part form one whole set ---

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<v1>fp32|fp16|bf16))?"
    r"(?:-(?P<shard>\d{5})-of-(?P<total>\d{5}))?(?:\.(?P<v2>fp32|fp16|bf16))?\.safetensors")
_DTYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16",
           "torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}


def pick_files(names, dtype=None, others=True, where=""):
    """The weight files, out of all file names of a part's folder, that are to be loaded together.

    Several variants may lie side by side (`model.fp16.safetensors`, `model.safetensors`, either as one file or as
    shards `model-00001-of-00002.safetensors`); taking two of them would load every key twice. The set of the requested
    dtype is taken, else the plain one, else (`others`) whichever there is; one file goes before shards.

    names: file names without folder. dtype: None, a torch.dtype, or "fp32", "fp16", "bf16". where: put before errors.
    Returns the names in order. Raises FileNotFoundError where there is no set, or names the missing shard.
    """
    if dtype is not None and str(dtype) not in _DTYPES:
        raise ValueError(f"dtype must be fp32, bf16 or fp16, not {dtype}")
    sets = {}  # (variant, number of shards) -> {shard: name}
    for name in sorted(names):
        if match := _WEIGHTS.fullmatch(name):
            variant = match["v1"] or match["v2"] or "plain"
            sets.setdefault((variant, int(match["total"] or 1)), {})[int(match["shard"] or 1)] = name
    for variant in (_DTYPES.get(str(dtype)), "plain", *(("bf16", "fp16", "fp32") if others else ())):
        total, *more = sorted(total for v, total in sets if v == variant) or [0]  # 1: a single file, which goes first
        if more and total > 1:
            raise FileNotFoundError(f"{where}shards of two different sets lie side by side, of {total} and of "
                                    f"{more[0]} files; keep one of them")
        shards = sets.get((variant, total), {})
        if missing := sorted(set(range(1, total + 1)) - set(shards)):
            like = next(iter(shards.values()))
            raise FileNotFoundError(where + "missing shard " + ", ".join(
                re.sub(r"-\d{5}-of-", f"-{i:05d}-of-", like) for i in missing))
        if shards:
            return [shards[i] for i in range(1, total + 1)]
    raise FileNotFoundError(f"{where}no weights: expected diffusion_pytorch_model.safetensors or model.safetensors, "
                            "whole or in shards")


def _needed(names, dtype, others=True):
    """The paths, out of all paths of a model's folder or repository, that the model needs."""
    wanted = ["tokenizer/tokenizer.json"]
    for part in PARTS:
        inside = [name.removeprefix(part + "/") for name in names if name.startswith(part + "/")]
        # fp16 is for the transformer alone, the others then run in bf16
        stored = "bf16" if part != "transformer" and _DTYPES.get(str(dtype)) == "fp16" else dtype
        wanted += [f"{part}/{name}" for name in ["config.json", *pick_files(inside, stored, others, f"{part}/: ")]]
    if missing := sorted(set(wanted) - set(names)):
        raise FileNotFoundError("missing " + ", ".join(missing))
    return wanted


def _listing(path):
    """Every file below `path` that can be opened, as posix paths (links into the cache included, dangling ones not)."""
    return [p.relative_to(path).as_posix() for p in Path(path).rglob("*") if p.is_file()]


# --- names to paths ---

def find_own(*names):
    """The first of `names` that lies in the folder SANASR_WEIGHTS, or None."""
    if root := os.environ.get("SANASR_WEIGHTS"):
        return next((Path(root) / name for name in names if (Path(root) / name).exists()), None)


def present(name, dtype=None):
    """Where the model or file `name` lies on this machine; None where it does not. Asks nothing of the network."""
    known = MODELS.get(name) or FILES[name]
    names = (name + Path(known.filename).suffix, known.filename) if name in FILES else (
        name, (known.repo or name).split("/")[-1])
    if own := find_own(*names):
        return own
    if known.repo is None:
        return HERE / name if (HERE / name).exists() else None
    import huggingface_hub as hub
    filename = "transformer/config.json" if name in MODELS else known.filename
    path = hub.try_to_load_from_cache(known.repo, filename, revision=known.revision)
    if not isinstance(path, str):  # None, or a mark: "known not to exist"
        return None
    if name in FILES:
        return Path(path)
    snapshot = Path(path).parent.parent
    try:
        _needed(_listing(snapshot), dtype, others=False)  # or the result would depend on what was fetched before
        return snapshot
    except FileNotFoundError:  # not the whole set
        return None


def _download(name, known, size, fetch):
    """The path that fetch(huggingface_hub) returns. Raises Unavailable."""
    import huggingface_hub as hub
    from huggingface_hub import constants
    if known.repo is None:
        raise Unavailable(f"{name}: it belongs into {HERE} but is not there; restore it with `git checkout weights`")
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    if not reason:
        try:  # first, because the library itself would retry for half a minute
            hub.get_session().head(constants.ENDPOINT, timeout=10)
        except Exception as error:
            reason = f"{constants.ENDPOINT} cannot be reached ({_line(error)})"
    if reason:
        what, keep = known.repo, name
        if name in FILES:
            what, keep = f"{what}/{known.filename}", name + Path(known.filename).suffix
        raise Unavailable(f"{name} is not on this machine and {reason}: fetch {what} ({size}) on a machine with a "
                          f"network and put it as {keep} into the folder that the environment variable SANASR_WEIGHTS "
                          "names")
    print(f"downloading {name} from {known.repo} ({size}; licence: {known.licence})", file=sys.stderr)
    try:
        return Path(fetch(hub))
    except Exception as error:
        raise Unavailable(f"{name}: the download from {known.repo} failed ({_line(error)}); "
                          "run the same command again, files that are complete are kept") from error


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def folder(name_or_path: str | Path, dtype=None) -> Path:
    """The folder of a model, from a name in MODELS (downloaded if need be) or from a path, which is returned as it is.

    dtype: None, a torch.dtype, or "fp32", "bf16", "fp16": the set of files to prefer, see `pick_files`.
    Raises Unavailable where a known model is unavailable, FileNotFoundError for a name that is neither.
    """
    name = str(name_or_path)
    if name not in MODELS:
        if Path(name).is_dir():
            return Path(name)
        raise FileNotFoundError(f"{name}: neither a folder nor a known model ({', '.join(MODELS)})")
    if path := present(name, dtype):
        return path
    model = MODELS[name]

    def fetch(hub):
        names = hub.HfApi().list_repo_files(model.repo, revision=model.revision)
        return hub.snapshot_download(model.repo, revision=model.revision, allow_patterns=_needed(names, dtype))
    return _download(name, model, f"up to {model.gigabytes:.1f} GB", fetch)


def file(name: str) -> Path:
    """The path of the single file `name`, a key of FILES, downloaded if need be.

    Its SHA-256 is checked after a download and for a file found under its file name in SANASR_WEIGHTS.
    Raises Unavailable.
    """
    known = FILES[name]
    if path := present(name):
        return _checked(path, known) if path == find_own(known.filename) else path
    path = _download(name, known, f"{known.megabytes:.0f} MB",
                     lambda hub: hub.hf_hub_download(known.repo, known.filename, revision=known.revision))
    try:
        return _checked(path, known)
    except Unavailable:
        path.resolve().unlink()  # the blob that the cache's link points to: a bad file must not be found next time
        raise


def sha256(path):
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _checked(path, known):
    if not (actual := sha256(path)).startswith(known.sha256):
        raise Unavailable(f"{path}: its SHA-256 is {actual[:16]}…, not {known.sha256[:16]}…; delete it and try again")
    return path
