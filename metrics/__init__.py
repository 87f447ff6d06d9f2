"""Image quality metrics as the field computes them, in torch and numpy alone."""
from metrics.perceptual import LPIPS

__all__ = ["LPIPS"]
