"""Metrics without a network: PSNR and SSIM on luma, and NIQE.

Everything is computed in float64 and for each image of a batch by itself. Colour follows pyiqa 0.1, which the tables of
recent papers were made with: PSNR and SSIM take the Y of studio-range YCbCr, NIQE plain grey.
"""
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from metrics.perceptual import EMBEDDED


def luma(x):
    """(B,3,H,W) RGB in [0,1] -> (B,1,H,W), Y of BT.601's YCbCr, 16/255…235/255."""
    r, g, b = x.double().unbind(1)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255)[:, None]


def psnr(sr, hr):
    """Peak signal-to-noise ratio of luma: 10 log10(1 / (mse + 1e-8)).

    sr, hr: (B,3,H,W) RGB in [0,1] -> (B,) in dB, higher is better; equal images give 80.
    """
    mse = (luma(sr) - luma(hr)).square().mean((1, 2, 3))
    return -10 * torch.log10(mse + 1e-8)


def _gaussian(size, sigma):
    """A normalised 1-D Gaussian, float64."""
    x = torch.arange(size, dtype=torch.float64) - size // 2
    g = torch.exp(-x.square() / (2 * sigma ** 2))
    return g / g.sum()


def _blur(x, kernel, step=1):
    """Convolution of (B,1,H,W) with a 1-D kernel in both directions, at every `step`-th of the valid positions."""
    kernel = kernel.to(x)
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1), stride=(1, step)), kernel.view(1, 1, -1, 1), stride=(step, 1))


def ssim(sr, hr):
    """Structural similarity of luma, rounded to 8 bits (Wang et al., "Image Quality Assessment", TIP 2004).

    11x11 Gaussian window, sigma 1.5, valid positions, no down-sampling; C1 = (0.01·255)², C2 = (0.03·255)². The
    contrast-structure term is clamped at 0. The range is taken as 255 though luma spans 16…235: so do the tables.

    sr, hr: (B,3,H,W) RGB in [0,1], at least 11x11 -> (B,) in [0,1], higher is better; equal images give 1.
    """
    x, y = (torch.round(luma(t) * 255) for t in (sr, hr))
    window, c1, c2 = _gaussian(11, 1.5), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blur(x, window), _blur(y, window)
    vx, vy, cov = (_blur(a * b, window) - ma * mb for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my)))
    contrast = ((2 * cov + c2) / (vx + vy + c2)).clamp(min=0)
    return ((2 * mx * my + c1) / (mx.square() + my.square() + c1) * contrast).mean((1, 2, 3))


class NIQE:
    """Natural image quality evaluator (Mittal et al., "Making a Completely Blind Image Quality Analyzer", SPL 2013).

    Blocks of 96x96 at full and half size are described by 36 statistics of their normalised luminance; the score is
    the distance of their multivariate Gaussian from that of 125 pristine photographs:
    sqrt(d · pinv((C0 + C1) / 2) · dᵀ), d the difference of the means. The model is that of the authors' release.

    x: (B,3,H,W) RGB in [0,1] with at least two 96x96 blocks -> (B,), lower is better, photographs lie around 3…7,
    a picture of one colour gives NaN.
    """
    block = 96

    def __init__(self, device="cpu"):
        state = {k: v.to(device) for k, v in load_file(EMBEDDED / "niqe_original.safetensors").items()}
        self.mu, self.cov = state["mu_pris_param"][0], state["cov_pris_param"]
        shape = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64, device=device)
        self.shapes = shape  # of the generalised Gaussian, searched on this grid by its moment ratio, which increases
        self.ratios = (2 * torch.lgamma(2 / shape) - torch.lgamma(1 / shape) - torch.lgamma(3 / shape)).exp()

    def __call__(self, x):
        rows, cols = x.shape[-2] // self.block, x.shape[-1] // self.block
        if rows * cols < 2:
            raise ValueError(f"NIQE needs at least two blocks of 96x96 pixels, but the image is "
                             f"{x.shape[-1]}x{x.shape[-2]}")
        r, g, b = x.float().unbind(1)  # in float32, like the original: it decides how halves are rounded
        grey = torch.round((0.299 * r + 0.587 * g + 0.114 * b) * 255).double()[:, None]
        grey = grey[..., :rows * self.block, :cols * self.block]
        features = torch.cat([self.features(grey, self.block), self.features(_half(grey), self.block // 2)], -1)
        return torch.stack([self.distance(f) for f in features])

    def distance(self, features):
        """The distance of one image's features (blocks, 36) from the model. Flat blocks have NaN among theirs."""
        whole = features[~features.isnan().any(1)]
        if len(whole) < 2:  # a picture of one colour
            return features.new_tensor(torch.nan)
        d = self.mu - features.nanmean(0)
        return (d @ torch.linalg.pinv((self.cov + whole.T.cov()) / 2) @ d).sqrt()

    def features(self, grey, size):
        """(B,1,H,W) in 0…255 -> (B, blocks, 18), blocks of size x size pixels."""
        window = _gaussian(7, 7 / 6)
        window = (window[:, None] * window).float().to(grey)  # float32's rounding shows where the image is flat
        mean, power = (F.conv2d(F.pad(t, (3, 3, 3, 3), mode="replicate"), window[None, None])
                       for t in (grey, grey.square()))
        deviation = ((power - mean.square()).abs() + torch.finfo(torch.float64).eps).sqrt()
        x = (grey - mean) / (deviation + 1)
        B, _, H, W = x.shape
        x = x.view(B, H // size, size, W // size, size).transpose(2, 3).flatten(1, 2)  # B, blocks, size, size
        shape, left, right = self.fit(x)
        features = [shape, (left + right) / 2]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):  # products of neighbours, cyclic within the block
            shape, left, right = self.fit(x * x.roll(shift, (-2, -1)))
            mean = (right - left) * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()
            features += [shape, mean, left, right]
        return torch.stack(features, -1)

    def fit(self, x):
        """Asymmetric generalised Gaussian: (…, h, w) -> shape, left and right scale, by matching moments."""
        square = x.square()
        left, right = ((square * side).sum((-2, -1)) / side.sum((-2, -1)) for side in (x < 0, x > 0))
        left, right = left.sqrt(), right.sqrt()
        g = left / right
        ratio = x.abs().mean((-2, -1)).square() / square.mean((-2, -1))
        ratio = ratio * (g ** 3 + 1) * (g + 1) / (g.square() + 1).square()
        above = torch.searchsorted(self.ratios, ratio).clamp(1, len(self.ratios) - 1)
        nearer_below = ratio - self.ratios[above - 1] <= self.ratios[above] - ratio
        index = (above - nearer_below.long()).masked_fill(ratio.isnan(), 0)  # a flat block: the original's argmin
        shape = self.shapes[index]
        scale = (torch.lgamma(1 / shape) - torch.lgamma(3 / shape)).exp().sqrt()
        return shape, left * scale, right * scale


def _half(x):
    """(B,1,H,W), H and W even -> half the size, like MATLAB's imresize: cubic (a = -0.5) stretched to 8 taps,
    edges mirrored with the edge pixel repeated."""
    taps = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    x = torch.cat([x[..., :3].flip(-1), x, x[..., -3:].flip(-1)], -1)
    x = torch.cat([x[..., :3, :].flip(-2), x, x[..., -3:, :].flip(-2)], -2)
    return _blur(x, taps, step=2)
