"""The metrics against pyiqa's scores: of synthetic pictures under seeded weights, and, where the data is there, against
the numbers that OSEDiff's authors published for RealSR (SANASR_DATA; the VGG16 trunk comes from SANASR_ORACLE)."""
import json
import math
import re
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from conftest import DATA, external, relative, table
from PIL import Image
from seeded import seeded

import eval as evaluation
import metrics
import weights
from metrics import iqa, report, score
from metrics.perceptual import DISTS, LPIPS, load_official

GOLDENS = json.loads((DATA / "metrics/goldens.json").read_text())
SIZES = {"syn_a": (224, 256), "syn_b": (200, 312)}
TABLE = re.compile(r".*(token_embedding\.weight|positional_embedding|pos_embed|position_emb|scale_emb|cls|cls_token|"
                   r"relative_position_bias_table)$")


def draw(key, shape, gain=1.0):
    """The seeded weight of a reference key: norms near 1, biases and tables small, the rest scaled by fan-in."""
    generator = torch.Generator().manual_seed(crc32(key.encode()))
    if key == "logit_scale":
        return torch.tensor(math.log(100.0))
    if key.endswith("running_var"):
        return 1 + 0.1 * torch.rand(shape, generator=generator)
    if key in ("alpha", "beta"):
        return 0.1 + 0.01 * torch.randn(shape, generator=generator)
    if TABLE.match(key):
        return 0.02 * torch.randn(shape, generator=generator)
    x = seeded(key, shape)
    return x.abs() if key.startswith("lin") else x * gain if len(shape) > 1 else x


def seed(model):
    """A state_dict for `model`, whose keys are the reference's."""
    return {k: draw(k, v.shape) if v.is_floating_point() else v for k, v in model.state_dict().items()}


def seed_perceptual(model):
    """The same for LPIPS and DISTS, loaded."""
    state = {}
    for k, v in model.state_dict().items():
        key = k.removeprefix("net.")
        state[key] = draw(key.replace(".", ".model.1.", 1) if key.startswith("lin") else key, v.shape, math.sqrt(2))
    return load_official(model, state)


def pair(name):
    """A synthetic reference and a distorted version, (1,3,H,W) in [0,1], by integer arithmetic."""
    h, w = SIZES[name]
    y, x = torch.arange(h).view(-1, 1), torch.arange(w).view(1, -1)
    disc = ((x - w // 2) ** 2 + (y - h // 3) ** 2 < (min(h, w) // 4) ** 2).long()
    reference = torch.stack([
        (x * (c + 2) + y * (4 - c)) * 96 // (w + h) + disc * (90 - 40 * c)
        + ((x ^ y) & 31) + ((x * x + 3 * y * (c + 1)) >> 4) % 17 for c in range(3)]).clamp(0, 255)[None]
    padded = torch.nn.functional.pad(reference.double(), (1, 1, 1, 1), mode="replicate").long()
    blurred = sum(padded[..., i:i + h, j:j + w] for i in range(3) for j in range(3)) // 9
    distorted = (blurred // 6 * 6 + (x * 7 + y * 13) % 11 - 5).clamp(0, 255)
    return reference.float() / 255, distorted.float() / 255


def probe(x, n=256):
    """n evenly spaced elements."""
    x = x.flatten()
    return x[(torch.arange(n) * (x.numel() - 1)) // (n - 1)]


@pytest.fixture
def vgg(monkeypatch, tmp_path):
    """VGG16's real trunk in float16, where the oracle is there."""
    path = external("SANASR_ORACLE", "metrics", "weights", "lpips_vgg_fp16.safetensors")
    (tmp_path / "vgg16.safetensors").symlink_to(path)
    monkeypatch.setenv("SANASR_WEIGHTS", str(tmp_path))
    return path


# --- against the reference ---

@pytest.mark.parametrize("name", SIZES)
def test_metrics_without_a_download(name):
    """In one batch the distorted picture against its reference, and the reference against itself."""
    hr, sr = pair(name)
    golden = GOLDENS[f"classic.{name}"]
    for metric, distorted, equal, tolerance in (
            ("psnr", golden["psnr_y"], 80, 1e-5), ("ssim", golden["ssim_y"], 1, 1e-5),
            ("lpips", sum(GOLDENS[f"lpips.alex.official.{name}"]), 0, 5e-5),  # its weights are fp16
            ("niqe", golden["niqe_dist"], golden["niqe_ref"], 1e-4)):
        found = metrics.load(metric)(torch.cat([sr, hr]), torch.cat([hr, hr]))
        assert found.tolist() == pytest.approx([distorted, equal], abs=tolerance), metric


def test_lpips_and_dists_seeded():
    for net in ("alex", "vgg"):
        model = seed_perceptual(LPIPS(net))
        for name in SIZES:
            hr, sr = pair(name)
            assert model.per_layer(sr * 2 - 1, hr * 2 - 1)[0].tolist() == pytest.approx(
                GOLDENS[f"lpips.{net}.seeded.{name}"], rel=1e-4, abs=1e-7)
    model, (hr, sr) = seed_perceptual(DISTS()), pair("syn_a")
    assert model(sr, hr).item() == pytest.approx(GOLDENS["dists.seeded.syn_a"], abs=1e-5)


def test_vgg_metrics_with_the_real_trunk(vgg):
    hr, sr = pair("syn_a")
    assert metrics.load("lpips-vgg")(sr, hr).item() == pytest.approx(sum(GOLDENS["lpips.vgg.official.syn_a"]), abs=1e-4)
    assert metrics.load("dists")(sr, hr).item() == pytest.approx(GOLDENS["dists.official.syn_a"], abs=1e-4)


def test_musiq_and_clipiqa():
    """Reference and distorted version, 200x312, in one batch score what each of them does alone."""
    musiq, clipiqa = iqa.MUSIQ(), iqa.CLIPIQA()
    iqa.load(musiq, seed(musiq), r"$.")
    text = {"token_embedding.weight": (49408, 512), "positional_embedding": (77, 512), "text_projection": (512, 1024),
            "ln_final.weight": (512,), "ln_final.bias": (512,), "logit_scale": (),
            "visual.attnpool.positional_embedding": (50, 2048)}
    block = {"attn.in_proj_weight": (1536, 512), "attn.in_proj_bias": (1536,), "attn.out_proj.weight": (512, 512),
             "attn.out_proj.bias": (512,), "mlp.c_fc.weight": (2048, 512), "mlp.c_fc.bias": (2048,),
             "mlp.c_proj.weight": (512, 2048), "mlp.c_proj.bias": (512,),
             **{f"ln_{i}.{k}": (512,) for i in (1, 2) for k in ("weight", "bias")}}
    text |= {f"transformer.resblocks.{i}.{k}": shape for i in range(12) for k, shape in block.items()}
    clipiqa.load(seed(clipiqa) | {k: draw(k, shape) for k, shape in text.items()})
    for metric, model in (("musiq", musiq), ("clipiqa", clipiqa)):
        assert model(torch.cat(pair("syn_b"))).tolist() == pytest.approx(
            [GOLDENS[f"{metric}.syn_b.{kind}"] for kind in ("ref", "dist")], abs=1e-4)


def test_maniqa_crops():
    with torch.device("meta"):
        model = iqa.MANIQA(0.8)
    crops = model.crop(pair("syn_a")[1] * 2 - 1)
    assert crops.shape == (20, 3, 224, 224)
    assert relative(probe(crops), GOLDENS["maniqa.syn_a.dist.crops20"]) < 1e-5


@pytest.mark.slow
def test_maniqa():
    """Under seeded weights the logits of the second pair of channel attentions reach 25 000: the softmax is an argmax,
    and float64 itself stands 5 % off the float32 reference. So the first stage, which has the same layers, is held to
    1e-4 and the score only to 2 %."""
    model = iqa.MANIQA(0.8, crops=1)
    state = seed(model)
    iqa.load(model, state, model.unused)
    seen = {}
    model.vit.blocks[9].register_forward_hook(lambda m, i, o: seen.update(vit_block9=o))
    model.tablock1[1].register_forward_hook(lambda m, i, o: seen.update(tablock1=o))
    model.swintransformer1.register_forward_hook(lambda m, i, o: seen.update(swin1=o))
    result = model(pair("syn_a")[0]).item()
    for name, value in seen.items():
        assert relative(probe(value), GOLDENS[f"maniqa.syn_a.ref.{name}"]) < 1e-4, name
    assert result == pytest.approx(GOLDENS["maniqa.syn_a.ref.score"], rel=0.02)
    for stage in (model.swintransformer1, model.swintransformer2):
        stage.scale = 0.13
    assert model(pair("syn_a")[1]).item() == pytest.approx(GOLDENS["maniqa.syn_a.dist.pipal"], rel=0.02)


TOLERANCE = {"psnr": 0.001, "ssim": 0.0002, "lpips": 0.001, "dists": 0.001, "niqe": 0.02}


@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_published_numbers(count, request):
    """OSEDiff's pictures of RealSR, image by image; two of them without DISTS, which needs VGG16."""
    folder = external("SANASR_DATA", "realsr")
    names = [n for n in TOLERANCE if n != "dists" or count == 100 and request.getfixturevalue("vgg")]
    published = table(folder / "osediff_published.csv")
    functions, error = {n: metrics.load(n) for n in names}, {n: [] for n in names}
    for image in list(published)[:count]:
        sr, hr = (torch.from_numpy(np.array(Image.open(folder / d / image).convert("RGB"))).permute(2, 0, 1)[None] / 255
                  for d in ("osediff", "hr"))
        for n, f in functions.items():
            error[n].append(f(sr, hr).item() - float(published[image][n]))
    for name, e in error.items():
        assert len(e) == count and max(map(abs, e)) < TOLERANCE[name], name
    if count == 100:
        assert abs(sum(error["niqe"]) / 100) < 0.002


# --- properties ---

@pytest.mark.parametrize("value", [-1.0, 0.3])
def test_lpips_is_a_loss(value):
    """Finite gradients for flat images, which have positions where all features vanish; inputs unchanged."""
    model = LPIPS.from_pretrained("alex")
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.full((2, 3, 64, 64), value, requires_grad=True)
    y = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64)
    loss = model(x, y)
    loss.sum().backward()
    assert loss.shape == (2,) and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert torch.equal(x.detach(), torch.full_like(x, value))
    # and they are right: central differences along one direction
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    model, y = model.double(), torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(model(x, y).sum(), x)
    step = 1e-6 * gradient.sign()
    slope = (model(x + step, y) - model(x - step, y)).item() / 2e-6
    assert slope == pytest.approx(gradient.abs().sum().item(), rel=1e-3)


def test_unavailable_weights_are_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    pictures(tmp_path, 1)
    pairs = [score.Pair("0.png", tmp_path / "0.png")]
    assert list(score.evaluate(None, pairs, ["musiq", "niqe"])[0]) == ["image", "niqe"]
    assert "skipped musiq" in (said := capsys.readouterr().err) and "musiq-koniq.pth" in said and said.count("\n") == 1
    with pytest.raises(weights.Unavailable):
        score.evaluate(None, pairs, ["musiq"])


# --- folders ---

def pictures(folder, count, size=(256, 192), noise=0, suffix=".png"):
    """`count` pictures of diagonal waves; picture i has noise of i times `noise`."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    waves = np.add.outer(np.arange(size[1]), np.arange(size[0])) % 64 * 3 + 20
    for i in range(count):
        x = waves[..., None].repeat(3, 2) + rng.normal(0, 1 + i * noise, (size[1], size[0], 3))
        Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(folder / f"{i}{suffix}")


def run(*argv):
    """eval.py's exit code, on a CPU."""
    return evaluation.main([*map(str, argv), "--device", "cpu"])


def test_eval_scores_folders(here, capsys):
    pictures(Path("hr"), 3)
    pictures(Path("sr"), 3, noise=20, suffix="_x4.png")
    pictures(Path("lr"), 3, size=(64, 48), suffix=".bmp")
    assert run("lr", "--sr", "sr", "--hr", "hr", "--metrics", "psnr,ssim,niqe", "--csv", "made/scores.csv", "--report",
               "r.html") == 0
    rows = table("made/scores.csv")
    assert list(rows) == ["0_x4.png", "1_x4.png", "2_x4.png", "mean"]
    values = [float(r["psnr"]) for r in rows.values()]
    assert values[0] > values[1] > values[2] and values[3] == pytest.approx(sum(values[:3]) / 3, abs=1e-5)
    out = capsys.readouterr().out
    assert "psnr ↑" in out and "niqe ↓" in out and f"{values[3]:.3f}" in out
    page = Path("r.html").read_text()
    assert page.count("data:image/webp") == 9 and "http" not in page and "src=\"/" not in page
    assert page.index("<h2>2_x4.png") < page.index("<h2>1_x4.png") < page.index("<h2>0_x4.png")  # worst first
    assert not list(here.rglob("*.tmp"))


def test_mean_leaves_out_pictures_of_one_colour(tmp_path, capsys):
    pictures(tmp_path / "sr", 2, size=(192, 192))
    Image.new("RGB", (192, 192), "grey").save(tmp_path / "sr/2.png")
    assert run("--sr", tmp_path / "sr", "--metrics", "niqe", "--csv", tmp_path / "s.csv") == 0
    *each, mean = [float(row["niqe"]) for row in table(tmp_path / "s.csv").values()]
    assert math.isnan(each[2]) and mean == pytest.approx(sum(each[:2]) / 2, abs=1e-5)
    assert "niqe: 1 of 3 pictures have none" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_eval_restores_then_scores(tiny_model):
    """The results of this run are scored, those of broken inputs are not; a missing reference is told before."""
    pictures(Path("lr"), 2, size=(24, 16))
    pictures(Path("hr"), 2, size=(96, 64), suffix=".jpg")
    Path("lr/2.png").write_bytes(b"broken")
    argv = ["lr", "--hr", "hr", "--model", tiny_model, "--metrics", "psnr", "--csv", "s.csv"]
    with pytest.raises(SystemExit, match=r"hr: no partner for 2.png \(1 of 3"):
        run(*argv)
    assert not Path("results").exists()
    pictures(Path("hr"), 3, size=(96, 64), suffix=".jpg")
    assert run(*argv, "--report", "r.html") == 1
    assert list(table("s.csv")) == ["0.png", "1.png", "mean"]
    page = Path("r.html").read_text()
    assert all(page.count(f"<figcaption>{kind}<") == 2 for kind in ("bicubic", "result", "reference"))


def test_the_report_escapes_names_and_ends_with_pictures_without_a_score(tmp_path):
    pictures(tmp_path, 1)
    pairs = [score.Pair("<b>&.png", tmp_path / "0.png")]
    report.write_report([{"image": "<b>&.png", "niqe": 3.0}], pairs, tmp_path / "r.html", note="<i>")
    page = (tmp_path / "r.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;&amp;.png" in page and "<i>" not in page
    rows = [{"image": name, "niqe": value} for name, value in zip("abcd", (3.0, math.nan, 9.0, 5.0), strict=True)]
    order, by = report.worst_first(rows, [None] * 4)
    assert by == "niqe" and [row["image"] for row, _ in order] == ["c", "d", "a", "b"]


def test_patch_is_the_central_crop():
    x = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    assert np.array_equal(score.crop(Image.fromarray(x), "patch"), x[22:278, 72:328])


def test_pictures_that_a_metric_cannot_score(tmp_path, capsys):
    pictures(tmp_path / "sr", 1, (24, 24))
    pair = score.Pair("0.png", tmp_path / "sr/0.png", tmp_path / "sr/0.png")
    row, = score.evaluate(None, [pair], ["psnr", "lpips", "niqe"])
    assert [name for name in ("psnr", "lpips", "niqe") if math.isnan(row[name])] == ["lpips", "niqe"]
    told = capsys.readouterr().err
    assert "sr/0.png: lpips needs at least 31 pixels a side, the image is 24x24" in told and "two blocks" in told
    x = torch.rand(1, 3, 100, 100)
    assert metrics.load("lpips")(x[..., :31, :31], x[..., :31, :31]) == 0
    assert metrics.load("ssim")(x[..., :11, :11], x[..., :11, :11]) > 0.9


def test_partners():
    with pytest.raises(ValueError, match="several partners: lr1/a.png, lr2/a.png"):
        score.partners(["a.png"], "lr1 lr2", [Path("lr1/a.png"), Path("lr2/a.png")])
    files = [Path("hr/a.jpg"), Path("hr/b.png"), Path("hr/b.jpg")]
    assert score.partners(["a_x4.png", "b.png"], "hr", files) == files[:2]
    with pytest.raises(ValueError, match="several partners"):
        score.partners(["b_x4.png"], "hr", files)
    with pytest.raises(ValueError, match="partner of several"):
        score.partners(["a.png", "a_x4.png"], "hr", files)


def test_every_metric_is_described():
    assert all(m.arrow in ("↑", "↓") and m.range and (m.download is None or m.download in weights.FILES)
               for m in metrics.METRICS.values())
    assert score.pick("all", True) == ["psnr", "ssim", "lpips", "dists", "niqe", "musiq", "maniqa", "clipiqa"]
    assert score.pick("all", False) == ["niqe", "musiq", "maniqa", "clipiqa"]
    assert score.pick(None, True) == ["psnr", "ssim", "lpips", "niqe"] and score.pick(None, False) == ["niqe"]
    assert score.pick(" PSNR, lpips-vgg,psnr", True) == ["psnr", "lpips-vgg"]


def test_a_new_metric_is_one_entry(tmp_path, monkeypatch, capsys):
    """A line in METRICS is enough: options, tables, CSV and report follow its fields."""
    monkeypatch.setitem(metrics.METRICS, "grey", metrics.Metric(
        lambda device: lambda x: x.mean((1, 2, 3)), False, "↓", "0…1", decimals=1))
    pictures(tmp_path, 2, size=(200, 200))
    assert run("--sr", tmp_path, "--csv", tmp_path / "s.csv", "--report", tmp_path / "r.html") == 0
    head, _, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["niqe", "↓", "grey", "↓"] and first.split()[-1] == "0.4"
    assert (tmp_path / "s.csv").read_text().startswith("image,niqe,grey\n")
    assert 'data-metric="grey" data-sign="-1"' in (tmp_path / "r.html").read_text()
