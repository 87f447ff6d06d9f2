"""What python -m lab.stability measures: relative changes that can be told beforehand, and the same ones again."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lab import stability as command
from lab.stability import STRENGTHS, degraded, stability
from photos.degrade import to_tensor


class Identity(nn.Module):
    """An autoencoder whose latents are the pixels, three times."""
    factor = 32

    def __init__(self):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.tensor(3.0)), []

    def encode(self, x):
        self.seen.append(x)
        return self.gain * x


def photo(width=70, height=100, seed=0):
    coarse = np.random.default_rng(seed).integers(60, 196, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_latents_that_are_the_pixels_change_as_they_do():
    vae = Identity()
    changes = stability(vae, [photo(), photo(seed=1)])
    assert list(changes) == [(kind, s) for kind, strengths in STRENGTHS.items() for s in strengths]
    for pixels, latents in changes.values():
        assert 0 < pixels < 1 and latents == pytest.approx(pixels, rel=1e-5)
    assert {x.shape for x in vae.seen} == {(1, 3, 96, 64)}, "the central part, a multiple of 32"
    for kind, strengths in STRENGTHS.items():
        by_strength = [changes[kind, s][0] for s in strengths]
        assert by_strength == sorted(by_strength), f"{kind} grows"
    first, again, other = (stability(vae, [photo()], seed)["noise", 15] for seed in (0, 0, 1))
    assert first == again != other, "the seed decides the noise"
    with pytest.raises(ValueError, match="32 pixels a side, one is 31×100"):
        stability(vae, [photo(31)])


def test_each_degradation_does_what_it_says():
    x = to_tensor(photo(96, 96))
    rng = np.random.default_rng(0)
    noise = degraded(x, "noise", 15, rng) - x
    assert noise.std().item() * 255 == pytest.approx(15, rel=0.05)
    flat = torch.full((3, 64, 64), 128 / 255)  # which JPEG holds exactly
    for kind in ("blur", "JPEG", "down-sampling"):
        for strength in STRENGTHS[kind]:
            assert torch.allclose(degraded(flat, kind, strength, rng), flat), "nothing to lose in a flat picture"
            y = degraded(x, kind, strength, rng)
            assert y.shape == x.shape and not torch.equal(y, x)
            assert torch.allclose((y * 255).round() / 255, y)


def test_the_command(tiny_model, tmp_path, capsys):
    for i in range(2):
        photo(64, 64, i).save(tmp_path / f"{i}.png")
    arguments = [str(tmp_path), "--model", str(tiny_model), "--device", "cpu"]
    command.main(arguments)
    out = capsys.readouterr().out
    assert "2 photos" in out and len(out.splitlines()) == 2 + 12 and "JPEG 30" in out
    command.main(arguments)
    assert capsys.readouterr().out == out
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(SystemExit, match="error: .*broken.png"):
        command.main(arguments)
