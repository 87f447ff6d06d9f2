"""Full-reference distances between the features of ImageNet networks: LPIPS (AlexNet, VGG16) and DISTS (VGG16).

Both see an image as the ReLU outputs of a classifier at several depths, compare those, and weigh the differences with
numbers that were fitted to human judgements. They are plain modules: `LPIPS` also serves as a training loss.

    LPIPS  Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, v0.1 heads
    DISTS  Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", TPAMI 2020
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import weights

EMBEDDED = weights.HERE / "metrics"  # small parameters that live in the repository


class Features(nn.Module):
    """A classifier's convolutions, with torchvision's key names. (B,3,H,W) -> the last ReLU output of every stage.

    stages: the convolutions' names; channels: of the outputs; pooled: stages that the method `pool` goes before.
    """

    def forward(self, x):
        taps = []
        for i, names in enumerate(self.stages):
            x = self.pool(x) if i in self.pooled else x
            for name in names:
                x = F.relu(self.features[name](x), inplace=True)  # a convolution's backward does not need its output
            taps.append(x)
        return taps


class AlexNet(Features):
    """H and W must be at least 31."""

    stages, pooled, channels = (("0",), ("3",), ("6",), ("8",), ("10",)), (1, 2), (64, 192, 384, 256, 256)

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2)
        self.features = nn.ModuleDict({
            "0": nn.Conv2d(3, 64, 11, 4, 2), "3": nn.Conv2d(64, 192, 5, padding=2),
            "6": nn.Conv2d(192, 384, 3, padding=1), "8": nn.Conv2d(384, 256, 3, padding=1),
            "10": nn.Conv2d(256, 256, 3, padding=1)})


class VGG16(Features):
    """`pool` halves the size between the stages: max-pooling for the classifier and LPIPS, L2 pooling for DISTS."""

    stages = (("0", "2"), ("5", "7"), ("10", "12", "14"), ("17", "19", "21"), ("24", "26", "28"))
    pooled, channels = (1, 2, 3, 4), (64, 128, 256, 512, 512)

    def __init__(self, pool=None):
        super().__init__()
        self.pool = pool or nn.MaxPool2d(2)
        self.features = nn.ModuleDict()
        c_in = 3
        for c, names in zip(self.channels, self.stages, strict=True):
            for name in names:
                self.features[name] = nn.Conv2d(c_in, c, 3, padding=1)
                c_in = c


def vgg16_trunk():
    """The convolutions of torchvision's VGG16 (IMAGENET1K_V1) as a float32 state_dict `features.N.weight`, `.bias`.

    Raises weights.Unavailable where the file is neither cached nor reachable.
    """
    state = load_file(weights.file("vgg16"))
    return {k: v.float() for k, v in state.items() if k.startswith("features.")}


def load_official(model, state):
    """Load a state_dict with keys `features.N.*` (the trunk, model.net) and the model's own, any float dtype."""
    model.load_state_dict({f"net.{k}" if k.startswith("features.") else k: v.float() for k, v in state.items()})
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # DISTS: 1.3 times as fast


class LPIPS(nn.Module):
    """Learned perceptual distance v0.1. x, y: (B,3,H,W) in [-1, 1], not clamped -> (B,), 0 for equal images.

    Per tap, features are divided by their L2 norm over channels; the squared difference goes through a non-negative
    1x1 head and is averaged over positions; the five averages add up. Differentiable, the inputs are left alone.
    """

    def __init__(self, net="alex"):
        super().__init__()
        self.net = {"alex": AlexNet, "vgg": VGG16}[net]()
        for i, c in enumerate(self.net.channels):
            self.add_module(f"lin{i}", nn.Conv2d(c, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, net="alex"):
        """The official weights, frozen. AlexNet is embedded (fp16, widened); VGG16's trunk comes by `weights.file`."""
        if net == "alex":
            state = load_file(EMBEDDED / "lpips_alex_fp16.safetensors")
        else:
            state = load_file(EMBEDDED / "lpips_vgg_heads.safetensors") | vgg16_trunk()
        return load_official(cls(net), state)

    def per_layer(self, x, y):
        """The five terms, (B,5)."""
        taps_x, taps_y = (self.net((t - self.shift) / self.scale) for t in (x, y))
        terms = []
        for i, (fx, fy) in enumerate(zip(taps_x, taps_y, strict=True)):
            # 1e-10 stands outside the root, as in the original; vector_norm's gradient at 0 is 0, where sqrt's is NaN
            fx, fy = (f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10) for f in (fx, fy))
            terms.append(((fx - fy).square() * self.get_submodule(f"lin{i}").weight).sum(1).mean((1, 2)))
        return torch.stack(terms, 1)

    def forward(self, x, y):
        return self.per_layer(x, y).sum(1)


def l2_pool(x):
    """(B,C,H,W) -> half the size: the root of the squares' average under a 3x3 Hann window, which does not alias."""
    C = x.shape[1]
    side = x.new_tensor([0.25, 0.5, 0.25])
    window = (side[:, None] * side).expand(C, 1, 3, 3)
    return (F.conv2d(x.square(), window, stride=2, padding=1, groups=C) + 1e-12).sqrt()


def moments(x, y):
    """Means, variances and covariance over positions: two (B,C,H,W) -> five (B,C)."""
    mx, my = x.mean((2, 3)), y.mean((2, 3))
    sums = 0
    for a, b in zip(x.split(32, 2), y.split(32, 2), strict=True):  # strips stay in the cache: four times as fast
        a, b = a - mx[..., None, None], b - my[..., None, None]
        sums = sums + torch.stack([a.square().sum((2, 3)), b.square().sum((2, 3)), (a * b).sum((2, 3))])
    return mx, my, *(sums / (x.shape[2] * x.shape[3]))


class DISTS(nn.Module):
    """Deep image structure and texture similarity. x, y: (B,3,H,W) in [0,1] at their own size -> (B,), 0 if equal.

    Per channel of the image and of five VGG16 features, with moments over positions: texture
    S1 = (2 mx my + c) / (mx² + my² + c) and structure S2 = (2 cov + c) / (vx + vy + c), c = 1e-6.
    Score: 1 - sum(alpha S1 + beta S2), alpha and beta adding up to 1. The authors' own script first shrinks the shorter
    side to 256; published tables, made with pyiqa, do not, nor does this.
    """

    def __init__(self):
        super().__init__()
        self.net = VGG16(pool=l2_pool)
        channels = 3 + sum(VGG16.channels)
        self.alpha, self.beta = (nn.Parameter(torch.full((1, channels, 1, 1), 0.1)) for _ in range(2))
        self.register_buffer("mean", torch.tensor([.485, .456, .406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([.229, .224, .225]).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls):
        """The official weights, frozen: alpha and beta are embedded, VGG16 comes by `weights.file`."""
        return load_official(cls(), load_file(EMBEDDED / "dists_alpha_beta.safetensors") | vgg16_trunk())

    def taps(self, x):
        """x and its five VGG16 features."""
        return [x, *self.net((x - self.mean) / self.std)]

    def forward(self, x, y):
        return self.distance(self.taps(x), self.taps(y))

    def distance(self, taps_x, taps_y):
        """The score of two pictures by their `taps`: (B,)."""
        s1, s2 = [], []
        for fx, fy in zip(taps_x, taps_y, strict=True):
            mx, my, vx, vy, cov = moments(fx, fy)
            s1.append((2 * mx * my + 1e-6) / (mx.square() + my.square() + 1e-6))
            s2.append((2 * cov + 1e-6) / (vx + vy + 1e-6))
        total = self.alpha.sum() + self.beta.sum()
        alpha, beta = (t.flatten() / total for t in (self.alpha, self.beta))
        return 1 - (torch.cat(s1, 1) * alpha + torch.cat(s2, 1) * beta).sum(1)
