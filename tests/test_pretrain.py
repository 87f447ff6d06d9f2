"""The pre-training of the bundled model: what can be checked without training it."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from lab import pretrain
from metrics import LPIPS
from sanasr import DCAE, Gemma2, GemmaTokenizer, LinearDiT, SanaSR


def test_the_carried_model_without_its_adapter_fits_into_40_megabytes():
    with torch.device("meta"):
        parts = DCAE(pretrain.AUTOENCODER), LinearDiT(pretrain.PRIOR), Gemma2(pretrain.TEXT_ENCODER)
    assert sum(p.numel() for part in parts for p in part.parameters()) * 2 < 39e6  # fp16, room for the tokenizer


def test_tokenizer_training_merges_the_frequent_and_loses_nothing(tmp_path):
    lines = ["tree", "tree house", "treetop", "house", "Zürich"]
    bpe = pretrain.train_tokenizer(lines, 290)
    assert len(bpe["model"]["vocab"]) == 290
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe), encoding="utf-8")
    tokenizer = GemmaTokenizer(tmp_path)
    ids = tokenizer.encode("tree house, 樹")
    assert [tokenizer.pieces[i] for i in ids][:2] == ["<bos>", "tree"]
    raw = b"".join(bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.encode()
                   for p in (tokenizer.pieces[i] for i in ids[1:]))
    assert raw.decode() == "tree▁house,▁樹"


@pytest.mark.parametrize("name, expected", [
    ("inet_n01494475_hammerhead.webp", ["hammerhead"]), ("inet_n15075141_toilet_tissue.webp", ["toilet tissue"]),
    ("debian_BytheWater.webp", ["bythe water"]), ("debian_Bridge_by_Sander_Klootwijk.webp", ["bridge"]),
    ("urban_100.webp", ["building", "city"]), ("IMG_0001.jpg", [])])
def test_tags_of_file_names(name, expected):
    image = np.full((8, 8, 3), [60, 100, 140], np.uint8)
    assert pretrain.tags(Path(name), image) == [*expected, "blue"]


def test_tags_of_colours():
    image = np.zeros((40, 40, 3), np.uint8)
    assert pretrain.tags(Path("1.png"), image) == ["dark"]
    image[:, :24], image[:, 24:] = (250, 20, 30), (200, 200, 200)
    assert pretrain.tags(Path("1.png"), image) == ["red", "gray", "bright"]


def test_the_autoencoder_starts_as_a_linear_coder_and_all_of_it_trains():
    widths = [16, 32, 64, 64, 64, 64]
    model = DCAE(pretrain.AUTOENCODER | dict(latent_channels=32, encoder_block_out_channels=widths,
                                             decoder_block_out_channels=widths))
    torch.manual_seed(0)
    seen, unseen = torch.nn.functional.interpolate(torch.rand(112, 3, 4, 4) * 2 - 1, scale_factor=16, mode="bicubic",
                                                   align_corners=True).split(96)
    pretrain.linear_start(model, seen)
    y = model.decode(model.encode(unseen))
    assert (y - unseen).square().mean() < 0.02 * unseen.var(), "smooth pictures pass nearly unharmed"
    assert model.encode(seen).mean((0, 2, 3)).abs().max() < 0.3
    y.abs().mean().backward()
    gains = [p for name, p in model.named_parameters() if name.endswith(("norm.weight", "norm_out.weight"))]
    assert all(p.grad.abs().sum() > 0 for p in gains), "the residual blocks wake up"


def test_the_decoder_stage_leaves_the_latents_alone(tmp_path, monkeypatch):
    widths = [8, 16, 16, 16, 16, 32]
    config = pretrain.AUTOENCODER | dict(latent_channels=16, encoder_block_out_channels=widths,
                                         decoder_block_out_channels=widths)
    monkeypatch.setattr(pretrain, "AUTOENCODER", config)
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(tmp_path / f"{i}.png")
    before = DCAE(config).state_dict()
    pretrain.save(tmp_path / "autoencoder.pt", dict(ema=before))
    monkeypatch.setattr("sys.argv", ["pretrain", "decoder", "--data", str(tmp_path), "--out", str(tmp_path), "--crop",
                                     "64", "--batch", "2", "--steps", "2", "--device", "cpu"])

    def unavailable(name):
        raise pretrain.Unavailable(f"{name} is not here")
    monkeypatch.setattr("weights.file", unavailable)
    with pytest.raises(SystemExit, match="error: vgg16 is not here"):
        pretrain.main()
    alex = LPIPS.from_pretrained("alex")
    monkeypatch.setattr(LPIPS, "from_pretrained", lambda net: alex)
    monkeypatch.setattr(pretrain.DISTS, "from_pretrained", pretrain.DISTS)
    pretrain.main()
    after = torch.load(tmp_path / "decoder.pt", weights_only=True)["model"]
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder"}


def test_small_photos_are_left_out_or_mirrored(tmp_path):
    for i in range(40):
        Image.fromarray(np.full((50 + 20 * (i % 2), 70, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    photos, mirrored = pretrain.Photos([tmp_path], 64), pretrain.Photos([tmp_path], 64, mirror=True)
    assert len(photos.train) + len(photos.val) == 20 and len(mirrored.train) + len(mirrored.val) == 40
    assert min(min(image.shape[:2]) for _, image in mirrored.train) == 64
    assert not {path for path, _ in photos.train} & {path for path, _ in mirrored.val}


def test_learning_rate_warms_up_and_decays():
    rates = [pretrain.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == 1 / 200 and max(rates) == 1 and rates[-1] == 0.05
    assert rates[749] == 1 and rates[875] == pytest.approx(0.5)


def test_the_carried_model_beats_bicubic_and_an_unsharp_mask():
    root = Path(__file__).resolve().parent.parent
    hr = Image.open(root / "examples/portrait.png").convert("RGB").crop((0, 0, 144, 160))
    lr = hr.resize((36, 40), Image.Resampling.BOX)
    bicubic = lr.resize(hr.size, Image.Resampling.BICUBIC)
    sharpened = bicubic.filter(ImageFilter.UnsharpMask(radius=1.5, percent=300, threshold=0))
    x, *results = (pretrain.to_signed(np.array(image)[None]) for image in (
        hr, SanaSR.from_pretrained("embedded").restore(lr), bicubic, sharpened))
    lpips = LPIPS.from_pretrained("alex")
    restored, bicubic, sharpened = (lpips(y, x).item() for y in results)
    assert restored < 0.75 * bicubic and restored < 0.93 * sharpened
    assert sum(f.stat().st_size for f in (root / "weights/embedded").rglob("*") if f.is_file()) < 60e6
