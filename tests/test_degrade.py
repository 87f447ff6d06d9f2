"""The degradation: kernels by their moments, noise by its statistics, JPEG, and seeding."""
import io
import math
from collections import Counter

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from photos import degrade as d


def photo(height=128, width=160):
    """(3, H, W) in [0, 1]."""
    return d.to_tensor(conftest.photo(width, height))


def near(count, p, trials):
    """A count of `trials` draws of probability p, within four standard deviations."""
    assert abs(count / trials - p) < 4 * math.sqrt(p * (1 - p) / trials) + 1e-9, (count, trials, p)


@pytest.mark.parametrize("sigma_x, sigma_y, angle", [(1.5, 1.5, 0.0), (2.5, 1.0, 0.7), (0.8, 1.9, -2.0)])
def test_gaussian_moments_are_its_covariance(sigma_x, sigma_y, angle):
    k = d.gaussian_kernel(21, sigma_x, sigma_y, angle)
    assert k.shape == (21, 21) and abs(k.sum() - 1) < 1e-12 and (k >= 0).all()
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    cov = rotation @ torch.diag(torch.tensor([sigma_x ** 2, sigma_y ** 2])) @ rotation.T
    axis = torch.arange(21.0) - 10
    moments = torch.stack([(k * axis ** 2).sum(), (k.T * axis ** 2).sum(), (k * axis * axis[:, None]).sum()])
    assert torch.allclose(moments.float(), torch.stack([cov[0, 0], cov[1, 1], cov[0, 1]]), atol=0.02)


def test_generalised_and_plateau_shapes():
    for beta in (0.5, 1.0, 2.0, 3.0):  # the defining ratio k(r) / k(0) along the axis
        for plateau, ratio in ((False, math.exp(-0.5 * (9 / 4) ** beta)), (True, 1 / (1 + (9 / 4) ** beta))):
            k = d.gaussian_kernel(21, 2.0, 2.0, 0.0, beta, plateau)
            assert math.isclose(k[10, 13] / k[10, 10], ratio, rel_tol=1e-9)


def test_sinc_is_a_low_pass():
    for size, cutoff in ((21, 1.5), (13, 2.0)):
        k = d.sinc_kernel(size, cutoff)
        assert abs(k.sum() - 1) < 1e-12 and torch.allclose(k, k.T) and torch.allclose(k, k.flip(0)) and (k < 0).any()
        gain = torch.fft.fft2(k, s=(64, 64)).abs()[0]                      # along one axis, 2 pi / 64 apart
        edge = cutoff * 64 / (2 * math.pi)
        assert (gain[:int(edge * 0.6)] > 0.85).all() and gain[int(edge * 1.6):33].max() < 0.2
    k, x = d.sinc_kernel(7, 1.2), 1.2                                      # J1(x)/x by its series
    j1 = sum((-1) ** m / (math.factorial(m) * math.factorial(m + 1)) * (x / 2) ** (2 * m + 1) for m in range(12))
    assert math.isclose(k[3, 4] / k[3, 3], (j1 / x) / 0.5, rel_tol=1e-9)


def test_random_kernels_are_normal_and_of_the_sizes():
    rng, kinds, sizes, n = np.random.default_rng(0), Counter(), set(), 3000
    for _ in range(n):
        name, k = d.random_kernel(rng, d.FIRST.sigma)
        kind, size = name.rsplit(" ", 1)
        kinds[kind] += 1
        sizes.add(int(size))
        assert k.shape == (int(size), int(size)) and abs(k.sum() - 1) < 1e-9 and k.isfinite().all()
    assert sizes == {7, 9, 11, 13, 15, 17, 19, 21}
    near(kinds["sinc"], d.SINC, n)
    for kind, p in d.KERNELS.items():
        near(kinds[kind], p * (1 - d.SINC), n)


def test_blur_is_the_reflected_convolution():
    x = photo(37, 53).double()
    for p in (3, 6, 10):
        k = d.gaussian_kernel(2 * p + 1, 2.0, 0.7, 0.5) + 0.01 * torch.rand(2 * p + 1, 2 * p + 1)   # asymmetric
        want = F.conv2d(F.pad(x[:, None], (p,) * 4, mode="reflect"), k.flip(0, 1)[None, None])[:, 0]
        assert torch.allclose(d.blur(x, k), want, atol=1e-10)


def test_gaussian_noise_statistics():
    x = torch.full((3, 256, 256), 0.5)
    noise = (d.gaussian_noise(x, np.random.default_rng(1), 10, grey=False) - x) * 255
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 10) < 0.1
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.02
    noise = d.gaussian_noise(x, np.random.default_rng(1), 10, grey=True) - x
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2])


def test_poisson_noise_statistics():
    # 256 grey levels in equal parts: 256 photons at white, so the variance is value / 256, times scale squared
    x = (torch.arange(256).repeat_interleave(256).reshape(256, 256) / 255).expand(3, -1, -1)
    noise = d.poisson_noise(x, np.random.default_rng(2), 0.5, grey=False) - x
    for level in (40, 128, 200):
        got = noise[:, level].std()
        assert abs(got / (0.5 * math.sqrt(level / 255 / 256)) - 1) < 0.1 and abs(noise[:, level].mean()) < 0.002
    noise = d.poisson_noise(x * 0.8, np.random.default_rng(2), 0.2, grey=True) - x * 0.8
    assert torch.allclose(noise[0], noise[2], atol=1e-6) and noise.std() > 0


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_jpeg_is_pillows_with_halved_chroma(quality):
    x, file = photo() * 1.2 - 0.1, io.BytesIO()
    rgb = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(rgb).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    want = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert torch.equal(d.jpeg(x, np.int64(quality)), want)


def test_output_is_eight_bit_quarter_size_and_seeded():
    x = photo()
    a, b, c = d.degrade(x, (3, 1, 5)), d.degrade(x, (3, 1, 5)), d.degrade(x, (3, 1, 6))
    assert a.shape == (3, 32, 40) and torch.equal(a, b) and not torch.equal(a, c)
    assert a.min() >= 0 and a.max() <= 1 and torch.equal(a, (a * 255).round() / 255)
    assert torch.equal(x, photo()), "the input is left alone"


def test_distribution_of_choices():
    x, n, count, jpegs = photo(80, 80), 600, Counter(), []
    for i in range(n):
        trace = []
        d.degrade(x, (0, 0, i), trace)
        names = [name.split() for name, _ in trace]
        first = [word[0] for word in names].index("jpeg")                              # ends the first order
        for order, part in ((d.FIRST, names[:first]), (d.SECOND, names[first + 1:])):
            for what, *words in part:
                count[order, what] += 1
                if what in ("resize", "noise") and words[0] != "final":
                    count[order, words[0]] += 1
                    count[words[1]] += 1
                if what == "resize" and words[0] != "final":
                    assert order.factor[0] <= float(words[2]) + 5e-3 and float(words[2]) <= order.factor[1] + 5e-3
        count["final sinc"] += ["final", "sinc"] in [word[:2] for word in names]
        count["jpeg last"] += names[-1][0] == "jpeg"
        jpegs += [int(words[0]) for what, *words in names if what == "jpeg"]
    assert len(jpegs) == 2 * n and 30 <= min(jpegs) <= 32 and 93 <= max(jpegs) <= 95
    for order, blur in ((d.FIRST, 1.0), (d.SECOND, 0.8)):
        for key, p in zip(("up", "down", "keep", "gaussian", "blur"), (*order.up_down_keep, 0.5, blur), strict=True):
            near(count[order, key], p, n)
    for key, p in (("grey", 0.4), *((mode, 1 / 3) for mode in d.MODES)):
        near(count[key], p, 2 * n)
    near(count["final sinc"], 0.8, n)
    near(count["jpeg last"], 0.5, n)


def test_enlarge_is_pillows_bicubic_on_eight_bits():
    lr = d.degrade(photo(), 0)
    image = d.to_image(lr)
    want = np.asarray(image.resize((160, 128), Image.BICUBIC)).astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    x_l = d.enlarge(lr)
    assert x_l.shape == (3, 128, 160) and np.allclose(x_l.numpy(), want, atol=1e-6)
    assert torch.equal(d.enlarge(image), x_l)


def test_the_mild_share_keeps_more_and_no_share_changes_nothing():
    def error(i, **options):
        return ((d.enlarge(d.degrade(photo(), i, **options)) + 1) / 2 - photo()).square().mean().item()

    assert sum(error(i, mild=1.0) for i in range(12)) < 0.5 * sum(error(i) for i in range(12))
    lr = [d.degrade(photo(), i, mild=0.5) for i in range(40)]
    mild = sum(torch.equal(x, d.degrade(photo(), i, mild=1.0)) for i, x in enumerate(lr))
    assert 8 < mild < 32 and all(torch.equal(x, (x * 255).round() / 255) for x in lr)
    assert torch.equal(d.degrade(photo(), 3), d.degrade(photo(), 3, mild=0.0))


def test_sharpen_steepens_edges_only():
    flat = torch.full((3, 96, 96), 0.4)
    assert torch.allclose(d.sharpen(flat), flat, atol=1e-6)
    edge = torch.cat([flat[..., :48] * 0.5, flat[..., 48:]], -1)
    assert d.sharpen(edge).std() > edge.std() * 1.01


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 82, 80), (1, 80, 80), (2, 3, 80, 80)])
def test_bad_sizes_are_named(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        d.degrade(torch.zeros(shape), 0)


def test_command_line(tmp_path, capsys):
    d.to_image(photo(131, 97)).save(tmp_path / "hq.png")
    d.main([str(tmp_path / "hq.png"), "--out", str(tmp_path / "lr.png"), "--seed", "5", "--sheet"])
    assert Image.open(tmp_path / "lr.png").size == (24, 32)
    assert Image.open(tmp_path / "lr.sheet.png").width > 300 and "jpeg" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--out .*hq.png is the photo itself"):
        d.main([str(tmp_path / "hq.png"), "--out", str(tmp_path / "hq.png")])
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="bad.png"):
        d.main([str(tmp_path / "bad.png"), "--out", str(tmp_path / "no.png")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.png", "hq.png", "lr.png", "lr.sheet.png"]
