"""Content tags of a photo: the prompt extractor Π of Eq. 2 and 12, as the paper takes it from SeeSR.

    python -m photos.tagger photo.png                   the tags with their probabilities, then the joined line
    python -m photos.tagger --tagger ram photo.png      RAM without DAPE's adaptation to degraded photos
    python -m photos.tagger --convert                   once: a lean fp16 copy (0.43 GB) of the 5.6 GB checkpoint

RAM (Recognize Anything, Zhang et al. 2023) and DAPE (SeeSR, Wu et al. 2024: RAM plus LoRA, tuned so that a degraded
photo gets the tags of the clean one). Needs ram_swin_large_14m.pth and, for DAPE, DAPE.pth; both are fetched once. A
photo takes about 4 CPU-seconds on one core; its tags are then remembered in ~/.cache/sanasr (or $SANASR_CACHE).

    photo, any size              ┌ window attention 12×12, every second block shifted by 6 ┐
      │ resize, normalise        │                                                         │
    3×384×384 ── patches 4×4 ── 96×96×192 ─ 48×48×384 ─ 24×24×768 ─ 12×12×1536 ── [mean token, 144 tokens] → 145×512
                                                                                                  │ keys, values
    4585 tag embeddings of 512 ── 4585×768 queries ── 2 × (cross-attention, FFN) ── one logit a tag ── > its threshold

Module attributes carry the official key names, so a state dict loads strictly and without renaming.
"""
import argparse
import contextlib
import hashlib
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import weights
from photos.pictures import read_rgb, to_tensor, write_bytes
from photos.swin import Block, WindowAttention
from runs import command, pick_device
from sanasr import attend, clean_tags
from weights import cache_dir
from weights.dtypes import choose_dtypes
from weights.files import read_checkpoint, save_tensors

DATA = weights.HERE / "ram"  # the tag list and the thresholds, one entry a logit
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@dataclass(frozen=True)
class Config:
    """Sizes of RAM with Swin-L, the only published ones; tests use smaller."""
    size: int = 384                # height and width of the input
    width: int = 192               # channels of the first stage, doubled by each merging
    depths: tuple = (2, 2, 18, 2)
    heads: tuple = (6, 12, 24, 48)
    window: int = 12
    tags: int = 4585
    embed: int = 512               # what image and tag embeddings share
    hidden: int = 768              # of the tagging head, 4 heads, FFN 4 times as wide


# --- the image encoder: Swin (Liu et al. 2021), its blocks in photos/swin.py; B, H, W, C throughout ---


class PatchMerging(nn.Module):
    """B, H, W, C → B, H/2, W/2, 2C. The four neighbours go column by column: (0,0), (1,0), (0,1), (1,1)."""

    def __init__(self, width):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x):
        B, H, W, C = x.shape
        x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """Blocks, every second one shifted unless a single window holds everything; then the merging, if any."""

    def __init__(self, width, depth, heads, window, side, last):
        super().__init__()
        shift = window // 2 if side > window else 0
        self.blocks = nn.Sequential(*(Block(width, 4 * width, WindowAttention(width, heads, window, shift * (i % 2)))
                                      for i in range(depth)))
        self.downsample = nn.Identity() if last else PatchMerging(width)

    def forward(self, x):
        return self.downsample(self.blocks(x))


class Swin(nn.Module):
    """B, 3, size, size → B, 1 + L, 8·width: the mean of all tokens, then the L tokens of the last stage."""

    def __init__(self, config):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, 4, 4), "norm": nn.LayerNorm(config.width)})
        last = len(config.depths) - 1
        self.layers = nn.Sequential(*(
            Stage(config.width << i, depth, heads, config.window, config.size // 4 >> i, i == last)
            for i, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True))))
        self.norm = nn.LayerNorm(config.width << last)

    def forward(self, x):
        x = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1))  # B, size/4, size/4, width
        x = self.norm(self.layers(x)).flatten(1, 2)
        return torch.cat([x.mean(1, keepdim=True), x], 1)


# --- the tagging head: each tag asks the image for itself, tags never see one another ---


class QueryLayer(nn.Module):
    """Post-norm cross-attention and FFN with BERT's names and its LayerNorm eps."""

    def __init__(self, width, image_width):
        super().__init__()
        def output(inner):
            return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
        self.crossattention = nn.ModuleDict({
            "self": nn.ModuleDict({"query": nn.Linear(width, width), "key": nn.Linear(image_width, width),
                                   "value": nn.Linear(image_width, width)}), "output": output(width)})
        self.intermediate, self.output = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)}), output(4 * width)

    def forward(self, x, image):
        """x: B, tags, width; image: B, L, image_width."""
        attn, out = self.crossattention["self"], self.crossattention["output"]
        y = attend(attn["query"](x), attn["key"](image), attn["value"](image), 4)
        x = out["LayerNorm"](x + out["dense"](y))
        h = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](h))


class RAM(nn.Module):
    """The tagger's network: B, 3, size, size, ImageNet-normalised → logits B, tags."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or Config()
        self.label_embed = nn.Parameter(torch.empty(config.tags, config.embed))
        self.visual_encoder = Swin(config)
        self.image_proj = nn.Linear(config.width << len(config.depths) - 1, config.embed)
        self.wordvec_proj = nn.Linear(config.embed, config.hidden)
        layers = nn.ModuleList(QueryLayer(config.hidden, config.embed) for _ in range(2))
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = nn.Linear(config.hidden, 1)

    @classmethod
    def from_state(cls, state, device="cpu", dtype=torch.float32, config=None):
        """A network on the given weights (all keys of an official checkpoint that tagging needs, LoRA merged)."""
        with torch.device("meta"):
            net = cls(config)
        net.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, strict=True, assign=True)
        return net.requires_grad_(False).eval()

    def forward(self, x):
        image = self.image_proj(self.visual_encoder(x))                               # B, 145, 512
        words = F.relu(self.wordvec_proj(self.label_embed)).expand(len(x), -1, -1)    # B, tags, hidden
        for layer in self.tagging_head["encoder"]["layer"]:
            words = layer(words, image)
        return self.fc(words).squeeze(-1)                                             # B, tags


# --- checkpoints ---


def _pick(state, shapes, path):
    """The entries of `state` that `shapes` asks for. Early checkpoints call the tagging head `vision_multi`."""
    state = {k.replace("vision_multi.", "tagging_head."): v for k, v in state.items()}
    missing = [k for k in shapes if k not in state]
    found = {k: f"{tuple(state[k].shape)}{'' if state[k].is_floating_point() else ' of integers'}"
             for k in shapes if k in state}
    wrong = [f"{k} is {text}, not {tuple(shapes[k])}" for k, text in found.items() if text != str(tuple(shapes[k]))]
    if missing or wrong:
        few = ", ".join((missing + wrong)[:3])
        raise ValueError(f"{path}: {len(missing)} keys missing and {len(wrong)} of another shape: {few}")
    return {k: state[k] for k in shapes}


def ram_state(path, config=None):
    """The weights of a RAM checkpoint that tagging needs, under RAM's keys.

    The rest of the 5.6 GB (optimiser, caption decoder, tag encoder; buffers, which are recomputed) is left unread.
    """
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in RAM(config).state_dict().items()}
    return _pick(read_checkpoint(path), shapes, path)


def add_dape(state, path):
    """`state`, from `ram_state`, with DAPE's LoRA merged: W + B·A/8. Computed in float32; `state` is not changed.

    Swin: q and v of every fused qkv (A holds both ranks one above the other, B both outputs); tagging head: query and
    key. `tag_encoder.*` and `text_decoder.*` of the file take no part in tagging.
    """
    targets = [k.removesuffix("weight") for k in state if k.endswith(("qkv.weight", "query.weight", "key.weight"))]
    shapes, state = {}, dict(state)
    for name in targets:
        (rows, columns), fused = state[name + "weight"].shape, name.endswith("qkv.")
        shapes[name + "lora_A"] = (16 if fused else 8, columns)
        shapes[name + "lora_B"] = (rows // 3 * 2 if fused else rows, 8)
    lora = _pick(read_checkpoint(path), shapes, path)
    for name in targets:
        a, b = lora[name + "lora_A"].float(), lora[name + "lora_B"].float()
        parts = [up @ down for down, up in zip(a.split(8), b.chunk(len(a) // 8), strict=True)]
        if name.endswith("qkv."):
            parts.insert(1, torch.zeros_like(parts[0]))  # q, k and v
        state[name + "weight"] = state[name + "weight"].float() + torch.cat(parts) / 8
    return state


LEAN = "ram_fp16.safetensors"  # what --convert writes, looked for in $SANASR_WEIGHTS and in the cache


def convert(out, path=None, config=None):
    """Write the weights of RAM's checkpoint that tagging needs to `out`, as fp16 safetensors."""
    state = {k: v.half() for k, v in ram_state(path or weights.file("ram"), config).items()}
    if bad := [k for k, v in state.items() if not v.isfinite().all()]:
        raise ValueError(f"{bad[0]} has values beyond fp16")
    save_tensors(state, out)
    return Path(out)


# --- use ---


def preprocess(image, size=384):
    """PIL image → 1, 3, size, size, ImageNet-normalised. The aspect is not kept.

    Bilinear *without* antialiasing, even when shrinking, as RAM and DAPE resize tensors.
    """
    x = F.interpolate(to_tensor(image)[None], (size, size), mode="bilinear", align_corners=False, antialias=False)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@cache
def tag_list():
    """(the tags, their thresholds as a float32 tensor), in the order of the logits."""
    tags = (DATA / "tags.txt").read_text(encoding="utf-8").splitlines()
    return tags, torch.tensor([float(x) for x in (DATA / "thresholds.txt").read_text().split()])


def select(logits):
    """logits: 4585 → [(tag, probability), …] of those above their thresholds, strictly, in the list's order."""
    tags, thresholds = tag_list()
    p = logits.detach().float().cpu().sigmoid()
    return [(tags[i], p[i].item()) for i in (p > thresholds).nonzero().flatten().tolist()]


class Tagger:
    """Finds the tags of pictures and keeps them on the disk. It holds 0.85 GB in float32: `del` it after use."""

    def __init__(self, net):
        self.net = net
        digest = hashlib.sha256()  # other weights or another precision must not find this one's results
        for key, value in net.state_dict().items():
            digest.update(key.encode() + str(value.dtype).encode())
            digest.update(value.flatten()[:16].float().cpu().numpy().tobytes())
        self.identity = digest.digest()

    @classmethod
    def from_pretrained(cls, name="dape", device=None, dtype=None, *, ram=None, dape=None, config=None):
        """name: "ram" or "dape". ram, dape: paths of the checkpoints, where `weights` is not to find them.

        By default on the GPU in bf16 where there is one, else on the CPU in float32.
        Raises weights.Unavailable where a checkpoint is unavailable, ValueError for a bad one.
        """
        if name not in ("ram", "dape"):
            raise ValueError(f"no tagger is called {name!r}: choose ram or dape")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or choose_dtypes(device)[0]
        lean = weights.find_own(LEAN) or (cache_dir() / LEAN if (cache_dir() / LEAN).exists() else None)
        paths, missing = {"ram": ram or lean, "dape": dape}, []
        for part in sorted({"ram", name}):
            try:
                paths[part] = paths[part] or weights.file(part)
            except weights.Unavailable as error:
                missing.append(str(error))
        if missing:  # all at once, rather than the second after the first has been fetched
            raise weights.Unavailable("; and ".join(missing))
        state = ram_state(paths["ram"], config)
        if name == "dape":
            state = add_dape(state, paths["dape"])
        return cls(RAM.from_state(state, device, dtype, config))

    def tag(self, image):
        """PIL image → [(tag, probability), …] in the list's order, words of degradation included."""
        image = image.convert("RGB")
        key = hashlib.sha256(self.identity + repr(image.size).encode() + image.tobytes()).hexdigest()
        path = cache_dir() / "tags" / key[:2] / f"{key[2:]}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged: computed afresh
            return [(str(tag), float(p)) for tag, p in json.loads(path.read_text(encoding="utf-8"))]
        result = select(self.logits(image))
        with contextlib.suppress(OSError):  # a full or read-only disk costs time, not the result
            write_bytes(path, json.dumps(result, ensure_ascii=False))
        return result

    @torch.no_grad()
    def logits(self, image):
        """PIL image → 4585 logits, float32."""
        p = self.net.label_embed
        return self.net(preprocess(image, self.net.config.size).to(p.device, p.dtype))[0].float()

    def tags(self, image):
        """PIL image → the tags for a prompt: those of `tag` without the words of degradation (`sanasr.clean_tags`)."""
        return clean_tags([tag for tag, _ in self.tag(image)])


@command
def main(argv=None):
    """The command line; see the top of the file. Photos are tagged as they are, eval.py's are enlarged before."""
    parser = argparse.ArgumentParser(description="Content tags of photos, by RAM or DAPE.")
    parser.add_argument("photos", nargs="*", type=Path, metavar="photo")
    parser.add_argument("--tagger", choices=("ram", "dape"), default="dape")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--convert", metavar="OUT.safetensors", nargs="?", type=Path, const=cache_dir() / LEAN,
                        help=f"write the lean fp16 copy of RAM's checkpoint, by default into the cache; it is found "
                             f"there and, as {LEAN}, in $SANASR_WEIGHTS")
    args = parser.parse_args(argv)
    if not args.photos and not args.convert:
        parser.error("name a photo")
    if args.convert and args.convert.suffix != ".safetensors":
        parser.error(f"--convert {args.convert}: a checkpoint's name ends with .safetensors")
    if args.convert:
        out = convert(args.convert)
        print(f"wrote {out}, {out.stat().st_size / 1e6:.0f} MB")
    if args.photos:
        tagger = Tagger.from_pretrained(args.tagger, pick_device(args.device))
    for photo in args.photos:
        image = read_rgb(photo)
        start = time.perf_counter()
        found = tagger.tag(image)
        tags = clean_tags([tag for tag, _ in found])
        print(f"{photo}: {len(found)} tags, {time.perf_counter() - start:.1f} s")
        for tag, p in found:
            print(f"  {p:.3f}  {tag}" + ("" if tag in tags else "   (degradation: not in the prompt)"))
        print(", ".join(tags))


if __name__ == "__main__":
    main()
