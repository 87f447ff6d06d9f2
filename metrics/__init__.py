"""Image quality metrics, as the tables of super-resolution papers compute them (pyiqa 0.1), in torch alone.

    score = metrics.load("lpips", "cpu")
    score(sr, hr)                        RGB float (B,3,H,W) in [0,1] -> (B,), one score for each image

classic.py holds PSNR, SSIM and NIQE, perceptual.py LPIPS and DISTS, iqa.py MUSIQ, MANIQA and CLIPIQA; score.py applies
them to folders and report.py shows the result. Small weights lie in weights/metrics/, large ones are downloaded when
first used. On a machine without a network they are found in the folder that SANASR_WEIGHTS names (see `weights`).
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from metrics.classic import NIQE, psnr, ssim
from metrics.iqa import CLIPIQA, MANIQA, MUSIQ
from metrics.perceptual import DISTS, LPIPS


@dataclass(frozen=True)
class Metric:
    """All that the project knows of a metric; tables, reports, options and help texts read it here."""
    make: Callable               # make(device) -> the function that scores
    needs_reference: bool
    arrow: str                   # "↑": higher is better; "↓": lower is
    range: str                   # what its values mean
    decimals: int = 4            # in tables; a CSV has 6
    smallest: int = 1            # pixels a side that it can take
    download: str | None = None  # its weights in weights.FILES; None where the repository has them
    usual: bool = True           # papers report it: a part of --metrics all
    float64: bool = False        # it computes in float64, which MPS lacks: it then runs on the CPU

    @property
    def sign(self):
        """1 if higher is better, else -1: sign · score is higher for the better picture."""
        return 1 if self.arrow == "↑" else -1


def _lpips(net):
    def make(device):
        model = LPIPS.from_pretrained(net).to(device)
        return lambda sr, hr: model(sr * 2 - 1, hr * 2 - 1)
    return make


def _network(cls, *args):
    return lambda device: cls.from_pretrained(*args).to(device)


METRICS = {
    "psnr": Metric(lambda device: psnr, True, "↑", "dB, luma; 80 = equal", decimals=3, float64=True),
    "ssim": Metric(lambda device: ssim, True, "↑", "0…1, luma", smallest=11, float64=True),
    "lpips": Metric(_lpips("alex"), True, "↓", "0…1, AlexNet", smallest=31),
    "lpips-vgg": Metric(_lpips("vgg"), True, "↓", "0…1, VGG16", smallest=16, download="vgg16", usual=False),
    "dists": Metric(_network(DISTS), True, "↓", "0…1", download="vgg16"),
    "niqe": Metric(NIQE, False, "↓", "about 2…20", decimals=3, float64=True),
    "musiq": Metric(_network(MUSIQ), False, "↑", "0…100", decimals=3, download="musiq-koniq"),
    "maniqa": Metric(_network(MANIQA, "pipal"), False, "↑", "0…1, PIPAL", download="maniqa-pipal"),
    "maniqa-koniq": Metric(_network(MANIQA, "koniq"), False, "↑", "0…1, KonIQ", download="maniqa-koniq", usual=False),
    "clipiqa": Metric(_network(CLIPIQA), False, "↑", "0…1", smallest=31, download="clip-rn50"),
}


def load(name: str, device: str | torch.device = "cpu"):
    """The metric `name` as a function score(sr[, hr]) -> (B,) on `device`, without gradients.

    name: a key of METRICS. sr, hr: RGB float (B,3,H,W) in [0,1]; hr is ignored by metrics that need no reference.
    Raises ValueError for images that do not fit, weights.Unavailable where large weights are unavailable.
    """
    metric = METRICS[name]
    if metric.float64 and torch.device(device).type == "mps":
        device = "cpu"
    function = metric.make(device)

    @torch.inference_mode()
    def score(sr, hr=None):
        if min(sr.shape[-2:]) < metric.smallest:
            raise ValueError(f"{name} needs at least {metric.smallest} pixels a side, the image is "
                             f"{sr.shape[-1]}x{sr.shape[-2]}")
        if not metric.needs_reference:
            return function(sr.to(device))
        if hr is None or hr.shape != sr.shape:
            raise ValueError(f"{name} needs a reference of the same size, {tuple(sr.shape)}")
        return function(sr.to(device), hr.to(device))
    return score
