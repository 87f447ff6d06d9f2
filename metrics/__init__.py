"""Image quality metrics, as the tables of super-resolution papers compute them (pyiqa 0.1), in torch alone.

    score = metrics.load("lpips", "cpu")
    score(sr, hr)                        RGB float (B,3,H,W) in [0,1] -> (B,), one score for each image

classic.py holds PSNR, SSIM and NIQE, perceptual.py LPIPS and DISTS, iqa.py MUSIQ, MANIQA and CLIPIQA; score.py applies
them to folders and report.py shows the result. Small weights lie in weights/metrics/, large ones are downloaded when
first used. On a machine without a network they are found in the folder that SANASR_WEIGHTS names (see `weights`).
"""
from dataclasses import dataclass

import torch

from metrics.classic import NIQE, psnr, ssim
from metrics.iqa import CLIPIQA, MANIQA, MUSIQ
from metrics.perceptual import DISTS, LPIPS

__all__ = ["ALL", "LPIPS", "METRICS", "Metric", "load"]


@dataclass(frozen=True)
class Metric:
    """make(device) -> the function that scores; `range`: what its values mean."""
    make: object
    needs_reference: bool
    better: str  # "higher" or "lower"
    range: str


def _lpips(net):
    def make(device):
        model = LPIPS.from_pretrained(net).to(device)
        return lambda sr, hr: model(sr * 2 - 1, hr * 2 - 1)
    return make


METRICS = {
    "psnr": Metric(lambda device: psnr, True, "higher", "dB, luma; 80 = equal"),
    "ssim": Metric(lambda device: ssim, True, "higher", "0…1, luma"),
    "lpips": Metric(_lpips("alex"), True, "lower", "0…1, AlexNet"),
    "lpips-vgg": Metric(_lpips("vgg"), True, "lower", "0…1, VGG16"),
    "dists": Metric(lambda device: DISTS.from_pretrained().to(device), True, "lower", "0…1"),
    "niqe": Metric(NIQE, False, "lower", "about 2…20"),
    "musiq": Metric(lambda device: MUSIQ.from_pretrained().to(device), False, "higher", "0…100"),
    "maniqa": Metric(lambda device: MANIQA.from_pretrained("pipal").to(device), False, "higher", "0…1, PIPAL"),
    "maniqa-koniq": Metric(lambda device: MANIQA.from_pretrained("koniq").to(device), False, "higher", "0…1, KonIQ"),
    "clipiqa": Metric(lambda device: CLIPIQA.from_pretrained().to(device), False, "higher", "0…1"),
}
SMALLEST = {"ssim": 11, "lpips": 31, "lpips-vgg": 16, "clipiqa": 31}  # pixels a side that they can take
ALL = ("psnr", "ssim", "lpips", "dists", "niqe", "musiq", "maniqa", "clipiqa")  # what papers report


def load(name: str, device: str | torch.device = "cpu"):
    """The metric `name` as a function score(sr[, hr]) -> (B,) on `device`, without gradients.

    sr, hr: RGB float (B,3,H,W) in [0,1]; hr is ignored by metrics that need no reference. Raises ValueError for an
    unknown name and for images that do not fit, weights.Unavailable where large weights are unavailable.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; known are {', '.join(METRICS)}")
    metric = METRICS[name]
    if torch.device(device).type == "mps" and name in ("psnr", "ssim", "niqe"):
        device = "cpu"  # they compute in float64, which MPS does not have
    function = metric.make(device)

    @torch.inference_mode()
    def score(sr, hr=None):
        if min(sr.shape[-2:]) < SMALLEST.get(name, 1):
            raise ValueError(f"{name} needs at least {SMALLEST[name]} pixels a side, the image is "
                             f"{sr.shape[-1]}x{sr.shape[-2]}")
        if not metric.needs_reference:
            return function(sr.to(device))
        if hr is None:
            raise ValueError(f"{name} needs a reference")
        if sr.shape != hr.shape:
            raise ValueError(f"{name}: the images differ in size, {tuple(sr.shape)} and {tuple(hr.shape)}")
        return function(sr.to(device), hr.to(device))
    return score
