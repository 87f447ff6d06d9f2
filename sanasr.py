"""SANA-SR: one-step real-world image super-resolution, the whole method in one file.

How `SanaSR.restore` turns a photo of 128×128 into a picture of 512×512 (SANA-0.6B, B = 1):

    photo 128×128 ── bicubic ×4 ──►  x_L   1×3×512×512  in [-1, 1]
    x_L   ── DC-AE encoder · s ────►  z_L   1×32×16×16   32× smaller per side, s = 0.41407       (Eq. 1)
    tags ⊕ suffix ── Gemma-2 ──────►  c, m  1×T×2304 and 1×T, T ≤ 300                            (Eq. 2)
    z_L, τ = 900, c, m ── LinearDiT ► f     1×32×16×16   28 blocks over N = 256 tokens of 1152, + LoRA
    ẑ = z_L − σ_τ · f ─────────────►  ẑ     1×32×16×16   one update, no iteration                (Eq. 4)
    ẑ / s ── DC-AE decoder ────────►  x̂     1×3×512×512

Sections: the method · operators · LinearDiT · LoRA · DC-AE · Gemma-2 and its tokenizer · prompts. The folder weights/
reads weights and checks configs; photos/ reads pictures and cuts them into tiles.

Letters for shapes: B batch, C channels, H W picture or latent height and width, N = H·W tokens, T text tokens, n heads
of d channels, D width of the transformer, Dt width of the text states. Modules are named as in the official
checkpoints, which therefore load with `strict=True`.

Paper: "Efficient One-Step Diffusion Restoration Model with Compact Token Compression and Linear Attention"
(arXiv 2605.23451). DC-AE: arXiv 2410.10733. SANA: arXiv 2410.10629.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import itertools
import json
import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kernels
import weights
from photos.pictures import bicubic
from photos.restorer import Restorer, Stopwatch
from weights import configs
from weights.dtypes import choose_dtypes
from weights.files import Pretrained, fingerprint, open_weights, save_tensors

# --- The method: one latent update, and the restorer around it ---


def sigma(t):
    """Noise level σ_τ of the timestep τ in [0, 1000] that SANA's network takes (after SANA's flow shift)."""
    return t / 1000


def one_step(dit, z: torch.Tensor, t: torch.Tensor, c: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ẑ = z_L − σ_τ · f(z_L, τ, c, m) (Eq. 4). z: B,C,h,w scaled latents; t: B; c: B,T,Dt; mask: B,T.

    The network computes in the dtype of c. The update is in float32, because bfloat16 would round σ = 0.9 to 0.8984.
    """
    return z - sigma(t)[:, None, None, None] * dit(z.to(c.dtype), t, c, mask)


class SanaSR(Restorer):
    """The whole restorer: autoencoder, transformer and prompts. The text encoder is loaded when a prompt needs it.

    scaling_factor: s; timestep: the τ that the adapter was trained for; stages: milliseconds by stage of the last
    `restore`; metadata: of the adapter's file, or of a pruned model's config.
    """

    def __init__(self, vae: DCAE, dit: LinearDiT, prompts: PromptEncoder, metadata: dict | None = None) -> None:
        """vae and dit are on the same device. prompts: (texts, instruction) -> (c, m), as `PromptEncoder`."""
        super().__init__(vae, dit, prompts, metadata)
        self.dit, self.timestep = dit, conditioning(self.metadata)["timestep"]

    @torch.inference_mode()
    def restore(self, image: Image.Image, prompt: str | list = "", *, scale: int = 4, suffix: str | None = None,
                timestep: float | None = None, tile: int | None = None, instruction: str | None = None,
                progress=None) -> Image.Image:
        """PIL image -> PIL image (RGB) of exactly `scale` times the size.

        The picture is enlarged `scale` times and restored at that size. scale=1 restores it without enlarging it.
        prompt: what the picture shows, as a text or a list of tags. `build_prompt` joins it and `suffix`.
        suffix, timestep (τ in (0, 1000]), instruction: by default those of the adapter's training, see `conditioning`.
        tile: side of the tiles that the networks process, in pixels of the result: a multiple of 32; 0 for no tiles;
        1408 by default. progress(stage, done, total) is called for every tile of the stages encode, dit and decode.
        Raises ValueError if the result is not finite; OSError or ValueError if the text encoder cannot be loaded.
        """
        how = conditioning(self.metadata, suffix, timestep, instruction)
        t = torch.full((1,), how["timestep"], device=self.device)
        by_tiles, clock = self.tiling(tile, progress), Stopwatch(self.device)
        c, m = self.encode_prompt(build_prompt(prompt, how["suffix"]), how["instruction"])  # 1,T,Dt and 1,T
        clock.lap("text")
        x = self.to_tensor(bicubic(image.convert("RGB"), scale), self.vae_dtype, self.vae.factor)  # 1,3,H,W
        z = self.scaling_factor * by_tiles("encode", self.vae.encode, x, down=self.vae.factor).float()  # 1,C,h,w
        clock.lap("encode")
        z = by_tiles("dit", lambda part: one_step(self.dit, part, t, c, m), z)
        clock.lap("dit")
        result = self.decode(z, scale * image.width, scale * image.height, by_tiles)
        clock.lap("decode")
        self.stages = clock.laps
        return result

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype | None = None, adapter: str | Path | bool | None = None,
                        merge: bool = True) -> SanaSR:
        """Load an official folder (or a name in `weights.MODELS`) with vae/, transformer/, text_encoder/, tokenizer/.

        dtype: torch.float32, bfloat16 or float16, see `choose_dtypes`.
        adapter: a LoRA file. None: `adapter.safetensors` of the folder, if it exists. False: no adapter.
        merge: True adds the adapter to the weights (inference); False keeps it separate (training).
        Raises OSError or ValueError that names the file; weights.Unavailable if a known model is not on this machine
        and cannot be downloaded.
        """
        device = torch.device(device)
        dtype, vae_dtype = choose_dtypes(device, dtype)
        folder = weights.folder(name_or_folder, dtype)
        vae = DCAE.from_pretrained(folder / "vae", vae_dtype, device)
        dit = LinearDiT.from_pretrained(folder / "transformer", dtype, device)
        if adapter is None and (folder / "adapter.safetensors").exists():
            adapter = folder / "adapter.safetensors"
        # the adapter of a pruned model is merged already; its metadata are in config.json
        metadata = load_lora(dit, adapter) if adapter else dit.provenance
        if merge:
            merge_lora(dit)
        try:
            self = cls(vae, dit, PromptEncoder(folder, vae_dtype, device), metadata)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        self.folder = folder
        return self


# --- Operators shared by the networks ---


def to_tokens(x):
    """B,C,H,W -> B,H·W,C. No copy is made if x is channels-last, as all pictures and latents here are."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_picture(x, height, width):
    """B,H·W,C -> B,C,H,W in channels-last format, without a copy."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def attend(q, k, v, heads, **options):
    """Softmax attention of n heads of d channels: q …,N,n·d and k, v …,T,n·d -> …,N,n·d."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v))  # …,n,N,d and …,n,T,d
    # on a CPU the fused backward pass in bf16 takes four times as long as the plain formula's
    plain = q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(-3, -2).flatten(-2)


def checkpointed(block, *args, checkpointing=False):
    """block(*args). With `checkpointing`, its activations are not stored but recomputed in the backward pass.

    Trap: the backward pass runs after `adapters_off` exits, so the recomputation restores the adapters' scales.
    """
    if not (checkpointing and torch.is_grad_enabled()):
        return block(*args)
    scales = [module.adapter_scale for module in lora_modules(block).values()]
    return checkpoint(block, *args, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), adapters_at(block, scales)))


class Linear(nn.Linear):
    """nn.Linear with an optional low-rank adapter: y = W x + b + (α/r) B A x (Eq. 13); see `inject_lora`."""

    adapter_scale = 0.0  # α/r; 0 if there is no adapter or it is switched off

    def forward(self, x):
        y = F.linear(x, self.weight.flatten(1), self.bias)
        if self.adapter_scale:
            y = y + self.adapter_scale * self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))).to(y.dtype)
        return y


class Conv1x1(Linear):
    """A 1×1 convolution applied to tokens (B,N,C); its weight keeps the official shape (out, in, 1, 1)."""

    def __init__(self, in_channels, out_channels, bias=True):
        super().__init__(in_channels, out_channels, bias=bias)
        self.weight = nn.Parameter(self.weight[:, :, None, None])


class RMSNorm(nn.Module):
    """x / rms(x) · weight (+ bias) over the last axis. The norm is taken in float32, the bias is added in x's dtype."""

    def __init__(self, channels, eps=1e-5, bias=False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x):
        y = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return y if self.bias is None else y + self.bias


class GLUMBConv(nn.Module):
    """Mix-FFN: 1×1 expand, SiLU, depthwise 3×3, value · SiLU(gate), 1×1 project, on tokens B,N,C (SANA §2.3)."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.conv_inverted = Conv1x1(channels, 2 * hidden)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = Conv1x1(hidden, channels, bias=False)

    def forward(self, x, height, width):
        inverted, depth, point = self.conv_inverted, self.conv_depth, self.conv_point
        if inverted.adapter_scale or point.adapter_scale:  # the fused kernel does not compute adapters
            return point(kernels.depthwise_gate(inverted(x), height, width, depth.weight, depth.bias))
        return kernels.mix_ffn(x, height, width, inverted.weight, inverted.bias, depth.weight, depth.bias, point.weight)


# --- LinearDiT: SANA's diffusion transformer ---


def two_layers(in_channels, width, activation):
    """linear_1, activation, linear_2: …,in_channels -> …,width."""
    return nn.Sequential(OrderedDict(linear_1=nn.Linear(in_channels, width), activation=activation,
                                     linear_2=nn.Linear(width, width)))


class AdaLayerNormSingle(nn.Module):
    """One timestep embedding for all blocks: τ, B -> (modulation of the blocks B,6,D; the embedding itself B,D)."""

    def __init__(self, width):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": two_layers(256, width, nn.SiLU())})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t):
        frequency = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angle = t.float()[:, None] * frequency  # B,128
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.linear.weight.dtype)  # cosine half first
        e = self.emb["timestep_embedder"](sinusoid)
        return self.linear(F.silu(e)).unflatten(1, (6, -1)), e


class Attention(nn.Module):
    """The four projections of an attention with `heads` heads of `head_dim` channels; `bias`: of q, k and v."""

    def __init__(self, width, heads, head_dim, bias=True):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, heads * head_dim, bias=bias)
        self.to_k = Linear(width, heads * head_dim, bias=bias)
        self.to_v = Linear(width, heads * head_dim, bias=bias)
        self.to_out = nn.ModuleList([Linear(heads * head_dim, width)])


class LinearAttention(Attention):
    """ReLU linear self-attention, O(N) (Eq. 3)."""

    def forward(self, x):  # B,N,D
        q, k, v = (proj(x).unflatten(2, (self.heads, -1)) for proj in (self.to_q, self.to_k, self.to_v))  # B,N,n,d
        y = self.to_out[0](kernels.linear_attention(q, k, v, eps=1e-15).flatten(2))
        return y.clip(-65504, 65504) if y.dtype == torch.float16 else y


class CrossAttention(Attention):
    """Softmax attention of the picture's tokens to the text; `bias` is 0 for a kept and −10000 for a masked token."""

    def forward(self, x, c, bias):  # x: B,N,D; c: B,T,D; bias: B,1,1,T
        return self.to_out[0](attend(self.to_q(x), self.to_k(c), self.to_v(c), self.heads, attn_mask=bias))


class DiTBlock(nn.Module):
    """x += gate · LA(AdaLN x);  x += cross-attention(x, text);  x += gate · Mix-FFN(AdaLN x)."""

    def __init__(self, config):
        super().__init__()
        width, self.eps = config["cross_attention_dim"], config["norm_eps"]
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn1 = LinearAttention(width, config["num_attention_heads"], config["attention_head_dim"],
                                     config["attention_bias"])
        self.attn2 = CrossAttention(width, config["num_cross_attention_heads"], config["cross_attention_head_dim"])
        self.ff = GLUMBConv(width, int(config["mlp_ratio"] * width))

    def forward(self, x, c, bias, modulation, height, width):  # x: B,N,D; c: B,T,D; modulation: B,6,D
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).chunk(6, dim=1)  # B,1,D
        h = F.layer_norm(x, x.shape[2:], eps=self.eps) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(h)
        x = x + self.attn2(x, c, bias)  # trap: neither norm nor gate here; the official `norm2` is the FFN's
        h = F.layer_norm(x, x.shape[2:], eps=self.eps) * (1 + scale2) + shift2
        return x + gate2 * self.ff(h, height, width)


class LinearDiT(Pretrained):
    """SANA's transformer (diffusers' SanaTransformer2DModel): predicts ε − x_0 of x_t = (1 − σ) x_0 + σ ε.

    There is no positional embedding: position comes from the Mix-FFN's depthwise convolution.
    """

    checkpointing = False

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = configs.linear_dit(config)
        width = config["cross_attention_dim"]
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.patch_embed = nn.ModuleDict({"proj": Conv1x1(config["in_channels"], width)})
        self.time_embed = AdaLayerNormSingle(width)
        self.caption_projection = two_layers(config["caption_channels"], width, nn.GELU(approximate="tanh"))
        self.caption_norm = RMSNorm(width)
        self.transformer_blocks = nn.ModuleList(DiTBlock(config) for _ in range(config["num_layers"]))
        self.proj_out = nn.Linear(width, config["out_channels"] or config["in_channels"])

    def forward(self, z, t, c, mask, condition=None):
        """z: B,C,h,w scaled latents; t: B in [0, 1000]; c: B,T,Dt text states; mask: B,T of 0/1 -> B,C,h,w.

        condition: B,D,h,w, added to the embedded latents; see linearsr/.
        """
        if z.ndim != 4 or c.ndim != 3 or mask.shape != c.shape[:2] or t.shape != z.shape[:1]:
            raise ValueError(f"LinearDiT: expected z B,C,h,w, t B, c B,T,D, mask B,T; got "
                             f"{tuple(z.shape)}, {tuple(t.shape)}, {tuple(c.shape)}, {tuple(mask.shape)}")
        height, width = z.shape[2:]
        x = self.patch_embed["proj"](to_tokens(z))  # B,N,D
        if condition is not None:
            x = x + to_tokens(condition)
        modulation, e = self.time_embed(t)  # B,6,D and B,D
        c = self.caption_norm(self.caption_projection(c))  # B,T,D
        bias = ((1 - mask.to(x.dtype)) * -10000)[:, None, None]  # B,1,1,T
        for block in self.transformer_blocks:
            x = checkpointed(block, x, c, bias, modulation, height, width, checkpointing=self.checkpointing)
        # trap: the output's AdaLN takes the embedding before SiLU + linear
        shift, scale = (self.scale_shift_table + e[:, None]).chunk(2, dim=1)  # B,1,D
        x = F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift  # 1e-6 whatever `norm_eps` says
        return to_picture(self.proj_out(x), height, width)


# --- LoRA: low-rank adapters on the frozen prior (Eq. 13) ---

LORA_TARGETS = {
    "attn": ("to_q", "to_k", "to_v", "to_out.0"),  # self- and cross-attention: the paper's Appendix B
    "attn+ffn": ("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point"),  # its §3.2
}


def inject_lora(model: nn.Module, rank: int = 64, alpha: float | None = None, targets: str = "attn") -> list[str]:
    """Give every target projection of the transformer's blocks a trainable adapter, W + (α/r) B A with B = 0.

    rank: r; alpha: α, by default r. targets: a key of LORA_TARGETS. All other parameters are frozen. The adapters live
    in float32 whatever the model's dtype. Returns the names of the adapted modules.
    """
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules()
             if isinstance(module, Linear) and name.endswith(tuple("." + t for t in LORA_TARGETS[targets]))]
    for name in names:
        _attach_lora(model.get_submodule(name), rank, (rank if alpha is None else alpha) / rank)
    return names


def _attach_lora(module, rank, scale):
    out_features, in_features = module.weight.shape[:2]
    module.lora_A = nn.Linear(in_features, rank, bias=False, device=module.weight.device)  # Kaiming-uniform
    module.lora_B = nn.Linear(rank, out_features, bias=False, device=module.weight.device)
    nn.init.zeros_(module.lora_B.weight)
    module.adapter_scale = scale


def lora_modules(model):
    """{name: module} of all modules that carry an adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def lora_parameters(model):
    """{key: parameter} of the adapters, keys as in the adapter file: `<module>.lora_A.weight`, `.lora_B.weight`."""
    return {key: p for key, p in model.named_parameters() if ".lora_A." in key or ".lora_B." in key}


@contextlib.contextmanager
def adapters_at(model, scales):
    """A context within which the adapters of `model` have these scales α/r, in the order of `lora_modules`."""
    before = {module: module.adapter_scale for module in lora_modules(model).values()}
    for module, scale in zip(before, scales, strict=True):
        module.adapter_scale = scale
    try:
        yield
    finally:
        for module, scale in before.items():
            module.adapter_scale = scale


def adapters_off(model):
    """A context within which the model is the frozen prior f0."""
    return adapters_at(model, [0.0] * len(lora_modules(model)))


def save_lora(model, path, metadata=None, state=None):
    """Write the adapters, or `state` (say their average) under the same keys, as safetensors, atomically.

    metadata: {str: str}; "rank" and "alpha" are added. Where ranks or alphas differ, "rank" lists all ranks, and a JSON
    object {module: α} under "alphas" replaces "alpha".
    """
    state = lora_parameters(model) if state is None else state
    ranks = {name: module.lora_A.weight.shape[0] for name, module in lora_modules(model).items()}
    alphas = {name: module.adapter_scale * ranks[name] for name, module in lora_modules(model).items()}
    about = {"rank": " ".join(map(str, sorted({*ranks.values()})))}
    if len({*ranks.values()}) == len({*alphas.values()}) == 1:
        about["alpha"] = f"{next(iter(alphas.values())):g}"
    else:
        about["alphas"] = json.dumps(alphas)
    save_tensors({key: p.detach() for key, p in state.items()}, path, (metadata or {}) | about)


def read_lora(path, system="sana-sr"):
    """An adapter file -> ({key: matrix}, its metadata). PEFT's prefixes `transformer.`, `base_model.model.` are cut.

    system: what the adapter must be made for, "sana-sr" or "linearsr". A file without this entry is SANA-SR's.
    Raises ValueError that names the file.
    """
    state = {}
    with open_weights(path) as file:
        metadata = file.metadata() or {}
        for key in file.keys():
            x = file.get_tensor(key)
            if x.ndim < 2 or not x.is_floating_point() or not x.numel():
                raise ValueError(f"{path}: {key} is no matrix of floating numbers; only plain LoRA weights are read")
            state[re.sub(r"^(base_model\.model\.|transformer\.)+", "", key)] = x.flatten(1)
    if not state:
        raise ValueError(f"{path}: there is no adapter in it")
    if (found := metadata.get("system", "sana-sr")) != system:
        raise ValueError(f"{path}: an adapter for {found}, but {system} needs one of its own")
    for name in {"alpha", "timestep"} & set(metadata):
        if not re.fullmatch(r"\d+(\.\d*)?", metadata[name]):
            raise ValueError(f"{path}: its metadata says {name} = {metadata[name]!r}, which is no number")
    return state, metadata


def load_lora(model: nn.Module, path: str | Path, system: str = "sana-sr") -> dict:
    """Attach the adapters of a file to `model`; returns the file's metadata.

    Without "alpha" or "alphas" in the metadata α = r. system: see `read_lora`. Raises ValueError, naming file and key,
    if the adapter belongs to another base.
    """
    state, metadata = read_lora(path, system)
    try:
        alphas = {name: float(alpha) for name, alpha in json.loads(metadata.get("alphas", "{}")).items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: its metadata says alphas = {metadata['alphas']!r}, no numbers by module") from None
    known = set()
    for name, module in list(model.named_modules()):
        keys = [f"{name}.lora_{half}.weight" for half in "AB"]
        if not isinstance(module, Linear) or not state.keys() >= set(keys):
            continue
        a, b = (state[key] for key in keys)
        (out_features, in_features), rank = module.weight.shape[:2], len(a)
        if (a.shape[1], *b.shape) != (in_features, out_features, rank):
            raise ValueError(f"{path}: {name} does not fit a projection of {in_features} to {out_features} channels")
        _attach_lora(module, rank, alphas.get(name, float(metadata.get("alpha", rank))) / rank)
        known.update(keys)
    if unknown := sorted(state.keys() - known):  # a weight of the model itself is no part of an adapter
        raise ValueError(f"{path}: {unknown[0]} fits no projection of this model or lacks its other half; was the "
                         "adapter made for another model?")
    model.load_state_dict(state, strict=False)
    return metadata


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W ← W + (α/r) B A, in float32, then back to the weight's dtype; the adapters are gone afterwards."""
    for module in lora_modules(model).values():
        delta = module.adapter_scale * module.lora_B.weight.float() @ module.lora_A.weight.float()
        module.weight.copy_(module.weight.float() + delta.view_as(module.weight))
        del module.lora_A, module.lora_B, module.adapter_scale


# --- DC-AE: the 32× deep compression autoencoder ---


class ResBlock(nn.Module):
    """x + RMSNorm(conv(SiLU(conv x))): the high-resolution stages."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels, bias=True)

    def forward(self, x):  # B,C,H,W
        h = self.conv2(F.silu(self.conv1(x)))
        return x + self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MultiscaleLinearAttention(nn.Module):
    """x + RMSNorm(W [LA(qkv), LA(aggregated qkv)]): ReLU linear attention over all H·W positions (EfficientViT).

    Trap: q, k and v are concatenated *before* they are divided into heads. A head takes 3·d consecutive channels and
    splits them into its q, k, v. So the weight called `to_q` does not hold only queries.
    """

    def __init__(self, channels, head_dim, kernel_sizes):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        c = 3 * channels  # each coarser scale of q, k, v: a depthwise convolution, then a 1×1 within d of its channels
        self.to_qkv_multiscale = nn.ModuleList(nn.Sequential(OrderedDict(
            proj_in=nn.Conv2d(c, c, size, padding=size // 2, groups=c, bias=False),
            proj_out=nn.Conv2d(c, c, 1, groups=c // head_dim, bias=False))) for size in kernel_sizes)
        self.to_out = nn.Linear(channels * (1 + len(kernel_sizes)), channels, bias=False)
        self.norm_out = RMSNorm(channels, bias=True)

    def forward(self, x):  # B,C,H,W
        height, width = x.shape[2:]
        tokens = to_tokens(x)  # B,N,C
        qkv = torch.cat([self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)], dim=2)  # B,N,3C
        scales = [qkv] + [to_tokens(m(to_picture(qkv, height, width))) for m in self.to_qkv_multiscale]
        qkv = torch.cat(scales, dim=2).unflatten(2, (-1, 3 * self.head_dim))  # B,N,n,3d
        h = kernels.linear_attention(*qkv.chunk(3, dim=3), eps=1e-15).flatten(2)  # B,N,n·d
        return x + to_picture(self.norm_out(self.to_out(h)), height, width)


class GatedConv(GLUMBConv):
    """The EfficientViT block's feed-forward: the Mix-FFN of ratio 4, normalised before its own residual."""

    def __init__(self, channels):
        super().__init__(channels, 4 * channels)
        self.norm = RMSNorm(channels, bias=True)

    def forward(self, x):  # B,C,H,W
        return x + to_picture(self.norm(super().forward(to_tokens(x), *x.shape[2:])), *x.shape[2:])


class EfficientViTBlock(nn.Sequential):
    """Global mixing by linear attention, then local mixing: the low-resolution stages. B,C,H,W -> the same."""

    def __init__(self, channels, head_dim, kernel_sizes):
        attention = MultiscaleLinearAttention(channels, head_dim, kernel_sizes)
        super().__init__(OrderedDict(attn=attention, conv_out=GatedConv(channels)))


class DownBlock(nn.Module):
    """Half the size: a strided convolution (or convolution + space-to-channel), plus the space-to-channel shortcut
    whose 4·C_in channels are averaged in adjacent groups down to C_out (DC-AE §3.2)."""

    def __init__(self, in_channels, out_channels, strided, shortcut=True):
        super().__init__()
        self.out_channels, self.strided, self.shortcut = out_channels, strided, shortcut
        self.conv = nn.Conv2d(in_channels, out_channels if strided else out_channels // 4, 3, 2 if strided else 1, 1)

    def forward(self, x):  # B,C,H,W -> B,C',H/2,W/2
        h = self.conv(x) if self.strided else F.pixel_unshuffle(self.conv(x), 2)
        return h + F.pixel_unshuffle(x, 2).unflatten(1, (self.out_channels, -1)).mean(2) if self.shortcut else h


class UpBlock(nn.Module):
    """Twice the size: nearest-neighbour + convolution (or convolution + channel-to-space), plus the channel-to-space
    shortcut of the input with every channel repeated."""

    def __init__(self, in_channels, out_channels, nearest, shortcut=True):
        super().__init__()
        self.nearest, self.repeats = nearest, 4 * out_channels // in_channels if shortcut else 0
        self.conv = nn.Conv2d(in_channels, out_channels if nearest else 4 * out_channels, 3, padding=1)

    def forward(self, x):  # B,C,H,W -> B,C',2H,2W
        h = self.conv(F.interpolate(x, scale_factor=2)) if self.nearest else F.pixel_shuffle(self.conv(x), 2)
        return h + F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2) if self.repeats else h


def dcae_stage(config, side, i):
    """The blocks of stage i of the encoder or decoder as `config` describes them."""
    channels, kind = config[f"{side}_block_out_channels"][i], config[f"{side}_block_types"]
    kind = kind if isinstance(kind, str) else kind[i]
    depth, scales = config[f"{side}_layers_per_block"][i], config[f"{side}_qkv_multiscales"][i]
    if kind == "ResBlock":
        return [ResBlock(channels) for _ in range(depth)]
    return [EfficientViTBlock(channels, config["attention_head_dim"], scales) for _ in range(depth)]


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, depths = config["encoder_block_out_channels"], config["encoder_layers_per_block"]
        strided, self.latent_channels = config["downsample_block_type"] == "Conv", config["latent_channels"]
        # a first stage of depth 0 has no blocks at full resolution: the picture goes straight to the second width
        self.conv_in = (nn.Conv2d(config["in_channels"], widths[0], 3, padding=1) if depths[0]
                        else DownBlock(config["in_channels"], widths[1], strided, shortcut=False))
        self.down_blocks = nn.Sequential()
        for i, depth in enumerate(depths):
            down = [DownBlock(widths[i], widths[i + 1], strided)] if depth and i + 1 < len(widths) else []
            self.down_blocks.append(nn.Sequential(*dcae_stage(config, "encoder", i), *down))
        self.conv_out = nn.Conv2d(widths[-1], self.latent_channels, 3, padding=1)
        self.out_shortcut = config["encoder_out_shortcut"]

    def forward(self, x):  # B,3,H,W -> B,C,H/32,W/32
        x = self.down_blocks(self.conv_in(x))
        z = self.conv_out(x)
        return z + x.unflatten(1, (self.latent_channels, -1)).mean(2) if self.out_shortcut else z


class Decoder(nn.Module):
    checkpointing = False

    def __init__(self, config):
        super().__init__()
        widths, depths = config["decoder_block_out_channels"], config["decoder_layers_per_block"]
        nearest, out_channels = config["upsample_block_type"] == "interpolate", config["in_channels"]
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[-1], 3, padding=1)
        self.repeats = widths[-1] // config["latent_channels"] if config["decoder_in_shortcut"] else 0
        self.up_blocks = nn.ModuleList()  # listed from high resolution to low, run from low to high
        for i, depth in enumerate(depths):
            up = [UpBlock(widths[i + 1], widths[i], nearest)] if depth and i + 1 < len(widths) else []
            self.up_blocks.append(nn.Sequential(*up, *dcae_stage(config, "decoder", i)))
        last = widths[0] if depths[0] else widths[1]
        self.norm_out = RMSNorm(last, bias=True)
        self.conv_out = (nn.Conv2d(last, out_channels, 3, padding=1) if depths[0]
                         else UpBlock(last, out_channels, nearest, shortcut=False))

    def forward(self, z):  # B,C,h,w -> B,3,32h,32w
        x = self.conv_in(z)
        if self.repeats:
            x = x + z.repeat_interleave(self.repeats, 1)
        for stage in reversed(self.up_blocks):
            x = checkpointed(stage, x, checkpointing=self.checkpointing)
        x = self.norm_out(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv_out(F.relu(x))


class DCAE(Pretrained):
    """The deep compression autoencoder (diffusers' AutoencoderDC): 32× smaller per side with six stages.

    Raises ValueError where a picture's sides are no multiples of that factor.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = configs.dcae(config)
        self.factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Picture B,3,H,W in [-1, 1] -> latents B,C,H/32,W/32, not yet multiplied by `scaling_factor`."""
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"DCAE.encode: sides must be multiples of {self.factor}, got {tuple(x.shape)}")
        return self.encoder(x.contiguous(memory_format=torch.channels_last))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents B,C,h,w (divided by `scaling_factor`) -> picture B,3,32h,32w, not clamped."""
        return self.decoder(z.contiguous(memory_format=torch.channels_last))


# --- Gemma-2: the text encoder, and its tokenizer ---


class GemmaRMSNorm(nn.Module):
    """x / rms(x) · (1 + weight) in float32. Trap: Gemma stores the gain minus one."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions and a tanh soft-cap on the logits."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, width = config["head_dim"], config["hidden_size"]
        self.scale, self.softcap = config["query_pre_attn_scalar"] ** -0.5, config["attn_logit_softcapping"]
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)

    def forward(self, x, rope, bias):  # x: B,T,width; bias: B,1,T,T
        def heads(y):
            return y.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # B,n,T,d

        def rotate(y):  # by halves: (a, b) -> (a cos − b sin, b cos + a sin)
            a, b = y.chunk(2, dim=3)
            return y * rope[0] + torch.cat([-b, a], dim=3) * rope[1]

        q, k, v = rotate(heads(self.q_proj(x))), rotate(heads(self.k_proj(x))), heads(self.v_proj(x))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        logits = q @ k.transpose(2, 3) * self.scale  # B,n,T,T
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)  # before the mask
        probs = (logits.float() + bias).softmax(dim=3).to(v.dtype)
        return self.o_proj((probs @ v).transpose(1, 2).flatten(2))


class GemmaMLP(nn.Module):
    """GeGLU: down(gelu(gate x) · up x), tanh approximation."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaLayer(nn.Module):
    """Four norms a layer: one before and one after each half, the latter before the residual addition."""

    def __init__(self, config):
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = GemmaAttention(config)
        self.mlp = GemmaMLP(width, config["intermediate_size"])
        self.input_layernorm = GemmaRMSNorm(width, eps)
        self.post_attention_layernorm = GemmaRMSNorm(width, eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(width, eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(width, eps)

    def forward(self, x, rope, bias):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, bias))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2(Pretrained):
    """The decoder-only Gemma-2, used as a text encoder: the states after the last norm, no language-model head."""

    filename = "model.safetensors"

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = configs.gemma2(config)
        count = config["num_hidden_layers"]
        kinds = config["layer_types"] or ["sliding_attention", "full_attention"] * count  # even layers slide
        self.slides = [kind == "sliding_attention" for kind in kinds[:count]]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in range(count))
        self.norm = GemmaRMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids B,T and mask B,T (1 = token, 0 = padding) -> states B,T,width; meaningless where mask is 0."""
        x = self.embed_tokens(ids)
        x = x * torch.tensor(x.shape[2] ** 0.5, dtype=x.dtype)  # B,T,width
        position = torch.arange(ids.shape[1], device=ids.device)
        half = self.config["head_dim"] // 2
        frequency = self.config["rope_theta"] ** (-torch.arange(half, device=ids.device) / half)
        angle = (position[:, None] * frequency).repeat(1, 2)  # T,d
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        distance = position[:, None] - position
        seen = (distance >= 0) & mask[:, None, None, :].bool()  # B,1,T,T: causal, and no padding
        near = seen & (distance < self.config["sliding_window"])
        full, sliding = (torch.zeros_like(m, dtype=torch.float32).masked_fill(~m, torch.finfo(torch.float32).min)
                         for m in (seen, near))
        for layer, slides in zip(self.layers, self.slides, strict=True):
            x = layer(x, rope, sliding if slides else full)
        return self.norm(x)


class GemmaTokenizer:
    """Byte-fallback BPE read from a Hugging Face `tokenizer.json` (a file, or the folder that holds it).

    Added tokens are cut out first, spaces become "▁", a character outside the vocabulary becomes its UTF-8 bytes, and
    the merge of lowest rank (leftmost first) is applied until none is left.
    """

    def __init__(self, path):
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            bpe = data["model"]
            self.vocab = bpe["vocab"]
            merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]  # both forms of the list
            v = self.vocab
            self.merges = {(v[a], v[b]): (rank, v[a + b]) for rank, (a, b) in enumerate(merges)}
            self.added = {token["content"]: token["id"] for token in data.get("added_tokens", []) if token["content"]}
            if any(type(i) is not int or i < 0 for i in [*v.values(), *self.added.values()]):
                raise ValueError("an id is no number")
            self.bos, self.unk = self.added["<bos>"], self.vocab["<unk>"]
            self.bytes = [self.vocab.get(f"<0x{b:02X}>", self.unk) for b in range(256)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a byte-fallback BPE tokenizer.json ({error!r})") from None
        longest_first = sorted(self.added, key=len, reverse=True)
        self.splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.pieces = {i: piece for piece, i in (self.vocab | self.added).items()}

    def encode(self, text: str) -> list[int]:
        """Token ids, <bos> first. The text is not changed; `tokenize_prompt` lower-cases it before."""
        ids = [self.bos]
        for part in self.splitter.split(text):
            ids += [self.added[part]] if part in self.added else self._merge(part.replace(" ", "▁"))
        return ids

    def spans(self, ids):
        """For every id the (start, end) of its UTF-8 bytes in the text with spaces as "▁"; <bos> is empty."""
        sizes = (1 if re.fullmatch("<0x[0-9A-F]{2}>", p) else len(p.encode()) for p in map(self.pieces.get, ids[1:]))
        return [(0, 0), *itertools.pairwise([0, *itertools.accumulate(sizes)])]

    def _merge(self, text):
        """BPE of one part, O(n log n): a heap of possible merges over a doubly linked list of symbols."""
        symbols, heap = [], []
        for char in text:
            i = self.vocab.get(char)
            symbols += [i] if i is not None else [self.bytes[b] for b in char.encode()]
        end = len(symbols)
        symbols.append(None)  # the end; a symbol that was merged into the one before it also becomes None
        before, after = list(range(-1, end)), [*range(1, end + 1), end]

        def push(left):
            if merge := self.merges.get((symbols[left], symbols[after[left]])):
                heapq.heappush(heap, (merge[0], left, merge[1]))

        for left in range(end):
            push(left)
        while heap:
            _, left, merged = heapq.heappop(heap)
            if self.merges.get((symbols[left], symbols[after[left]]), (0, None))[1] != merged:
                continue  # a neighbour has changed since this merge was noted
            symbols[left], symbols[after[left]] = merged, None
            after[left] = after[after[left]]
            before[after[left]] = left
            push(before[left])
            push(left)
        return [s for s in symbols if s is not None]


# --- Prompts: p = tags ⊕ quality suffix, and the mask m (Eq. 2) ---

SUFFIXES = {
    "appendix": "clean, extremely detailed, best quality, sharp, high-resolution",  # Appendix B: the default
    "main": "clean, sharp, best quality, detailed, 8K, high-resolution",  # §3.2
    "none": "",
}
DEGRADATION_WORDS = ("blurry", "blurred", "blur", "noise", "noisy", "low quality", "low resolution", "jpeg", "artifact",
                     "artifacts", "pixelated", "grainy", "compressed", "distorted")
_DEGRADED = re.compile(r"(?<!\w)(" + "|".join(w.replace(" ", "[ ▁_-]") for w in DEGRADATION_WORDS) + r")(?!\w)")
MAX_INSTRUCTION = 4096  # tokens; Gemma-2's context is 8192
MAX_TOKENS = 300  # of text, <bos> included, as SANA was trained
KEEP_ALL = 2  # the n of `tokenize_prompt` without an instruction: 300 tokens are encoded, and all of them kept
PROMPT_VERSION = 1  # raise it when the code makes other states of the same prompt: cached ones are then ignored


def clean_tags(tags):
    """The tags without those that contain a word of DEGRADATION_WORDS, in their order."""
    return [tag for tag in tags if not _DEGRADED.search(tag.lower())]


def build_prompt(content: str | list, suffix: str = "appendix") -> str:
    """content: a user's text, or a list of tags (which are cleaned); suffix: a name in SUFFIXES, or any text.

    "tree, branch" and "appendix" give "tree, branch, clean, extremely detailed, …"; either half may be empty.
    """
    content = content if isinstance(content, str) else ", ".join(clean_tags(content))
    return ", ".join(part for part in (content.strip(), SUFFIXES.get(suffix, suffix)) if part)


def conditioning(metadata, suffix=None, timestep=None, instruction=None, default_timestep=900.0):
    """What the update is conditioned on besides picture and tags: {"suffix", "timestep": τ, "instruction"}.

    The caller's value goes first, then that of the adapter's `metadata`, then the default: "appendix",
    `default_timestep`, no instruction. The prompt is then build_prompt(content, suffix).
    """
    def first(value, name, default):
        return metadata.get(name, default) if value is None else value
    return {"suffix": first(suffix, "suffix", "appendix"), "instruction": first(instruction, "instruction", ""),
            "timestep": float(first(timestep, "timestep", default_timestep))}


def tokenize_prompt(tokenizer, prompt, instruction=""):
    """-> (ids, mask, kept): token ids for the encoder; 0 or 1 for each kept position; the kept positions of its states.

    The prompt is lower-cased and stripped, as SANA does, and cut to 300 tokens with <bos>, without <eos>. There is no
    padding: Gemma is causal and padding is masked, so it has no effect. Degradation words get mask 0 (Eq. 2).
    After an instruction of n tokens, n + 298 tokens are encoded; the first and the last 299 positions are kept.
    """
    prompt = prompt.lower().strip()
    text = (instruction + prompt).replace(" ", "▁")
    ids = tokenizer.encode(instruction + prompt)
    n = len(tokenizer.encode(instruction)) if instruction else KEEP_ALL
    if n > MAX_INSTRUCTION:
        raise ValueError(f"the instruction has {n} tokens, at most {MAX_INSTRUCTION} are possible")
    ids = ids[:n + MAX_TOKENS - 2]
    words = [(len(text[:m.start()].encode()), len(text[:m.end()].encode()))
             for m in _DEGRADED.finditer(text, len(instruction))]
    mask = [0 if any(start < b and a < end for a, b in words) else 1 for start, end in tokenizer.spans(ids)]
    kept = [0, *range(n - 1, len(ids))]
    return ids, [mask[i] for i in kept], kept


class PromptEncoder:
    """Prompts to text states: the frozen Gemma-2, loaded only for prompts that are not in the cache.

    The cache is $SANASR_CACHE/prompts (by default ~/.cache/sanasr). A file's name is a hash of all that the states
    depend on. The text encoder, the largest part of the model, is freed when the new prompts are encoded.
    """

    def __init__(self, folder, dtype=torch.float32, device="cpu"):
        """folder: holds text_encoder/ and tokenizer/."""
        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)

    @functools.cached_property
    def identity(self):
        """All that text states depend on besides the prompt. The files are hashed once for each loaded model."""
        return [fingerprint(self.folder / "text_encoder"), fingerprint(self.folder / "tokenizer"), str(self.dtype),
                PROMPT_VERSION, MAX_TOKENS, DEGRADATION_WORDS]

    @torch.inference_mode()
    def __call__(self, prompts, instruction=""):
        """One prompt or several -> (c: B,T,Dt text states, m: B,T of 0/1), T the longest's length, at most 300."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        cache = weights.cache_dir() / "prompts"
        found, tokenizer, encoder = {}, None, None
        for prompt in dict.fromkeys(prompts):
            key = json.dumps([*self.identity, instruction, prompt])
            path = cache / (hashlib.sha256(key.encode()).hexdigest() + ".safetensors")
            try:
                with open_weights(path) as file:
                    found[prompt] = file.get_tensor("c"), file.get_tensor("m")
                continue
            except (SafetensorError, ValueError):
                pass  # missing or damaged: the prompt is encoded
            if encoder is None:
                tokenizer = GemmaTokenizer(self.folder / "tokenizer")
                encoder = Gemma2.from_pretrained(self.folder / "text_encoder", self.dtype, self.device)
                if max(tokenizer.pieces) >= len(encoder.embed_tokens.weight):
                    raise ValueError(f"{self.folder}: tokenizer/ has ids up to {max(tokenizer.pieces)}, text_encoder/ "
                                     f"embeds {len(encoder.embed_tokens.weight)}")
            ids, mask, kept = tokenize_prompt(tokenizer, prompt, instruction)
            ids = torch.tensor([ids], device=self.device)
            c = encoder(ids, torch.ones_like(ids))[0, kept].cpu()
            found[prompt] = c, torch.tensor(mask)
            with contextlib.suppress(OSError):  # if the cache cannot be written, prompts are encoded again each time
                save_tensors(dict(c=c, m=found[prompt][1]), path)
        states, masks = zip(*(found[prompt] for prompt in prompts), strict=True)
        pad = nn.utils.rnn.pad_sequence
        return pad(states, batch_first=True), pad(masks, batch_first=True)
