"""Learned metrics that need no reference: MUSIQ, MANIQA and CLIPIQA.

    MUSIQ    Ke et al., "MUSIQ: Multi-scale Image Quality Transformer", ICCV 2021; weights: KonIQ-10k
    MANIQA   Yang et al., "MANIQA: Multi-dimension Attention Network for No-Reference IQA", CVPRW 2022; PIPAL, KonIQ-10k
    CLIPIQA  Wang et al., "Exploring CLIP for Assessing the Look and Feel of Images", AAAI 2023; CLIP RN50 as it is

Attributes carry the key names of the official checkpoints. All take x: (B,3,H,W) RGB in [0,1] -> (B,), higher is
better; the images of a batch do not touch each other.
"""
import math
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

import weights
from photos.swin import Block, WindowAttention
from sanasr import attend
from weights.files import read_checkpoint


def read(name):
    """The state_dict in the file `name` of weights.FILES, float32."""
    state = read_checkpoint(weights.file(name))
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def load(model, state, unused):
    """Load `state` strictly, but for the keys that match the pattern `unused`, which the score does not depend on."""
    model.load_state_dict({k: v for k, v in state.items() if not re.match(unused, k)})
    return model.requires_grad_(False).eval()


# --- MUSIQ ---

def pad_same(x, kernel, stride):
    """Zero padding such that ceil(side / stride) outputs remain; the odd pixel goes right and below (TensorFlow)."""
    pads = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in (x.shape[-1], x.shape[-2])]
    return F.pad(x, [p for total in pads for p in (total // 2, total - total // 2)])


class StandardConv(nn.Conv2d):
    """Convolution, 'same' padding, whose weights are standardised per output channel on every call."""

    def __init__(self, c_in, c_out, kernel, stride=1):
        super().__init__(c_in, c_out, kernel, stride, bias=False)

    def forward(self, x):
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), (self.weight - mean) / (std + 1e-5),
                        stride=self.stride)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a projected shortcut."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1, self.gn1 = StandardConv(c_in, c_in, 1), nn.GroupNorm(32, c_in, eps=1e-4)
        self.conv2, self.gn2 = StandardConv(c_in, c_in, 3), nn.GroupNorm(32, c_in, eps=1e-4)
        self.conv3, self.gn3 = StandardConv(c_in, c_out, 1), nn.GroupNorm(32, c_out, eps=1e-4)
        self.conv_proj, self.gn_proj = StandardConv(c_in, c_out, 1), nn.GroupNorm(32, c_out, eps=1e-4)

    def forward(self, x):
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x)))


class SplitAttention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self, width, n):
        super().__init__()
        self.n = n
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.out(attend(self.query(x), self.key(x), self.value(x), self.n))


class MUSIQ(nn.Module):
    """Scores about 0…100. Patches of 32x32 from three scales, longer side 224, 384 and as it is, in one transformer.

    The original pads the tokens of the first two scales to fixed numbers and masks the padding; every token here is
    a real one, which gives the same.
    """
    width, grid = 384, 10

    def __init__(self):
        super().__init__()
        self.conv_root, self.gn_root = StandardConv(3, 64, 7, 2), nn.GroupNorm(32, 64, eps=1e-6)
        self.block1 = Bottleneck(64, 256)
        self.embedding = nn.Linear(8 * 8 * 256, self.width)
        encoder = self.transformer_encoder = nn.Module()
        encoder.cls = nn.Parameter(torch.zeros(1, 1, self.width))
        encoder.posembed_input, encoder.scaleembed_input = nn.Module(), nn.Module()
        encoder.posembed_input.position_emb = nn.Parameter(torch.zeros(1, self.grid ** 2, self.width))
        encoder.scaleembed_input.scale_emb = nn.Parameter(torch.zeros(3, self.width))
        encoder.transformer = nn.Sequential(OrderedDict(
            (f"encoderblock_{i}", Block(self.width, 1152, SplitAttention(self.width, 6), "attention", eps=1e-6))
            for i in range(14)))
        encoder.encoder_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = nn.Linear(self.width, 1)

    @classmethod
    def from_pretrained(cls):
        return load(cls(), read("musiq-koniq"), r"$.")

    def tokens(self, x, scale):
        """(B,3,H,W) in [-1,1] -> (B, patches, width), position and scale embedded."""
        x = pad_same(x, 32, 32)
        B, _, H, W = x.shape
        rows, cols = H // 32, W // 32
        x = x.view(B, 3, rows, 32, cols, 32).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 32, 32)
        x = F.relu(self.gn_root(self.conv_root(x)))               # B·patches, 64, 16, 16
        x = self.block1(F.max_pool2d(pad_same(x, 3, 2), 3, 2))    # B·patches, 256, 8, 8
        x = self.embedding(x.permute(0, 2, 3, 1).reshape(B, rows * cols, -1))
        i, j = (torch.arange(n, device=x.device) * self.grid // n for n in (rows, cols))
        encoder = self.transformer_encoder
        return x + encoder.posembed_input.position_emb[:, (i[:, None] * self.grid + j).flatten()] \
            + encoder.scaleembed_input.scale_emb[scale]

    def forward(self, x):
        x = x * 2 - 1
        H, W = x.shape[-2:]
        sizes = [(round(H * side / max(H, W)), round(W * side / max(H, W))) for side in (224, 384)]
        scales = [F.interpolate(x, size, mode="bicubic", align_corners=False) for size in sizes] + [x]
        encoder = self.transformer_encoder
        x = torch.cat([encoder.cls.expand(len(x), -1, -1), *(self.tokens(t, i) for i, t in enumerate(scales))], 1)
        return self.head(encoder.encoder_norm(encoder.transformer(x)[:, 0])).squeeze(1)


# --- MANIQA ---

class Attention(nn.Module):
    """Self-attention with one projection for q, k and v."""

    def __init__(self, width, n):
        super().__init__()
        self.n = n
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.proj(attend(*self.qkv(x).chunk(3, -1), self.n))


class ViT(nn.Module):
    """ViT-B/8 as far as it is needed. (B,3,224,224) -> (B,784,4·768), what blocks 6 to 9 put out, without the class."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 768, 8, 8)})
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, 768)) for n in (1, 28 * 28 + 1))
        self.blocks = nn.ModuleList(Block(768, 4 * 768, Attention(768, 12), eps=1e-6) for _ in range(10))

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x[:, 1:])
        return torch.cat(outputs[6:], 2)


class TransposedAttention(nn.Module):
    """Attention between channels: (B,C,N), a channel's map is its token."""

    def __init__(self, n):
        super().__init__()
        self.c_q, self.c_k, self.c_v = (nn.Linear(n, n) for _ in range(3))

    def forward(self, x):
        y = F.scaled_dot_product_attention(self.c_q(x), self.c_k(x), self.c_v(x))  # B,C,N
        return x + y.transpose(1, 2).reshape(x.shape)  # not transposed back: the original's bug, its weights need it


class Swin(nn.Module):
    """Two layers of two blocks and a convolution, added with the weight `scale`: (B,C,H,W) -> the same."""

    def __init__(self, width, scale):
        super().__init__()
        self.scale = scale
        self.layers = nn.ModuleList(nn.ModuleDict({
            "blocks": nn.Sequential(*(Block(width, 768, WindowAttention(width, 4, 4, shift)) for shift in (0, 2))),
            "conv": nn.Conv2d(width, width, 3, padding=1)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            y = layer["blocks"](x.permute(0, 2, 3, 1))
            x = x + self.scale * F.relu(layer["conv"](y.permute(0, 3, 1, 2)))
        return x


class MANIQA(nn.Module):
    """Scores about 0…1. The mean over the patches of up to 20 crops of 224x224, weighted by an attention of its own.

    scale: the weight of the Swin layers' output, 0.13 in the PIPAL network and 0.8 in the KonIQ-10k one.
    """
    unused = (r"vit\.(blocks\.1[01]|norm|head)\.|.*\.downsample\.|.*\.relative_position_index$|.*\.attn_mask$")

    def __init__(self, scale, crops=20):
        super().__init__()
        self.crops = crops
        self.vit = ViT()
        self.tablock1 = nn.Sequential(*(TransposedAttention(784) for _ in range(2)))
        self.conv1, self.swintransformer1 = nn.Conv2d(4 * 768, 768, 1), Swin(768, scale)
        self.tablock2 = nn.Sequential(*(TransposedAttention(784) for _ in range(2)))
        self.conv2, self.swintransformer2 = nn.Conv2d(768, 384, 1), Swin(384, scale)
        # Index 2 was a dropout.
        self.fc_score = nn.Sequential(nn.Linear(384, 384), nn.ReLU(), nn.Identity(), nn.Linear(384, 1), nn.ReLU())
        self.fc_weight = nn.Sequential(nn.Linear(384, 384), nn.ReLU(), nn.Identity(), nn.Linear(384, 1), nn.Sigmoid())

    @classmethod
    def from_pretrained(cls, data="pipal"):
        """data: pipal (the tables of super-resolution papers) or koniq."""
        return load(cls({"pipal": 0.13, "koniq": 0.8}[data]), read(f"maniqa-{data}"), cls.unused)

    def crop(self, x):
        """(1,3,H,W) -> (crops,3,224,224): row by row on a square grid, cut off after `crops`, so not its last row."""
        if (short := min(x.shape[-2:])) <= 224:
            x = F.interpolate(x, scale_factor=225 / short, mode="bilinear", align_corners=False)
        down, right = ((n - 224) // math.isqrt(self.crops) for n in x.shape[-2:])
        side = math.ceil(math.sqrt(self.crops))
        crops = [x[..., i * down:i * down + 224, j * right:j * right + 224] for i in range(side) for j in range(side)]
        return torch.cat(crops[:self.crops])

    def patches(self, x):
        """(B,3,224,224) in [-1,1] -> score and weight of each patch, (B,784) each."""
        x = self.tablock1(self.vit(x).transpose(1, 2))                                 # B, 3072, 784
        x = self.swintransformer1(self.conv1(x.unflatten(2, (28, 28)))).flatten(2)     # B, 768, 784
        x = self.swintransformer2(self.conv2(self.tablock2(x).unflatten(2, (28, 28))))
        x = x.flatten(2).transpose(1, 2)                                               # B, 784, 384
        return self.fc_score(x).squeeze(2), self.fc_weight(x).squeeze(2)

    def forward(self, x):
        result = []
        for image in x.split(1):
            crops = self.crop(image * 2 - 1).split(4)  # four at a time: 1 GB
            s, w = (torch.cat(t) for t in zip(*map(self.patches, crops), strict=True))
            result.append((s * w).sum() / (w.sum() + 1e-8))
        return torch.stack(result)


# --- CLIPIQA ---

class ResNetBlock(nn.Module):
    """Bottleneck that shrinks by average pooling."""

    def __init__(self, c_in, c, stride):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.downsample = nn.Identity() if c_in == 4 * c else nn.Sequential(
            nn.Conv2d(c_in, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        if self.stride > 1:
            x, y = F.avg_pool2d(x, self.stride), F.avg_pool2d(y, self.stride)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class AttentionPool(nn.Module):
    """Attention whose only query is the mean: (B,2048,h,w) -> (B,1024). No positions, so any size will do."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(2048, 2048) for _ in range(3))
        self.c_proj = nn.Linear(2048, 1024)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        mean = x.mean(1, keepdim=True)
        x = torch.cat([mean, x], 1)
        return self.c_proj(attend(self.q_proj(mean), self.k_proj(x), self.v_proj(x), 32).squeeze(1))


class ModifiedResNet(nn.Module):
    """CLIP's RN50 on an image of any size: (B,3,H,W), normalised -> (B,1024)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        c_in = 64
        for i, (c, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), 1):
            first = ResNetBlock(c_in, c, 1 if i == 1 else 2)
            setattr(self, f"layer{i}", nn.Sequential(first, *(ResNetBlock(4 * c, c, 1) for _ in range(depth - 1))))
            c_in = 4 * c
        self.attnpool = AttentionPool()

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


# Good and bad by turns, as ids of CLIP's tokenizer without their zero padding: the prompts never change.
PROMPTS = {
    "Good image": (49406, 886, 2867, 49407),
    "bad image": (49406, 2103, 2867, 49407),
    "Sharp image": (49406, 8157, 2867, 49407),
    "blurry image": (49406, 21977, 2867, 49407),
    "sharp edges": (49406, 8157, 20938, 49407),
    "blurry edges": (49406, 21977, 20938, 49407),
    "High resolution image": (49406, 1400, 9977, 2867, 49407),
    "low resolution image": (49406, 1042, 9977, 2867, 49407),
    "Noise-free image": (49406, 9307, 268, 1139, 2867, 49407),
    "noisy image": (49406, 33495, 2867, 49407),
}


def text_features(state):
    """CLIP's text encoder on the ten prompts, from its state_dict: (10, 1024). Causal, so padding cannot matter."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, state[f"{name}weight"], state[f"{name}bias"])

    features = []
    for ids in PROMPTS.values():
        x = state["token_embedding.weight"][list(ids)] + state["positional_embedding"][:len(ids)]   # T, 512
        for block in (f"transformer.resblocks.{i}" for i in range(12)):
            q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj_").chunk(3, -1)
            x = x + linear(attend(q, k, v, 8, is_causal=True), f"{block}.attn.out_proj.")
            y = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc.")
            x = x + linear(y * torch.sigmoid(1.702 * y), f"{block}.mlp.c_proj.")  # QuickGELU
        features.append(norm(x[-1], "ln_final") @ state["text_projection"])
    return torch.stack(features)


class CLIPIQA(nn.Module):
    """Scores 0…1: how much nearer to the good than to the bad prompt, the mean over five pairs of prompts."""

    def __init__(self):
        super().__init__()
        self.visual = ModifiedResNet()
        self.register_buffer("text", torch.zeros(1024, 10), persistent=False)  # unit vectors, times the logit scale
        self.register_buffer("mean", torch.tensor([.48145466, .4578275, .40821073]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([.26862954, .26130258, .27577711]).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls):
        return cls().load(read("clip-rn50"))

    def load(self, state):
        """Take CLIP's whole state_dict in float32; the text encoder is used once, here."""
        load(self, state, r"(?!visual\.)|visual\.attnpool\.positional_embedding$")
        with torch.no_grad():
            self.text.copy_(F.normalize(text_features(state), dim=1).T * state["logit_scale"].exp())
        return self

    def forward(self, x):
        image = F.normalize(self.visual((x - self.mean) / self.std), dim=1)
        return (image @ self.text).unflatten(1, (5, 2)).softmax(2)[..., 0].mean(1)
