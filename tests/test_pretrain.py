"""The pre-training of the carried model: what can be checked without training it."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sanasr import DCAE, Gemma2, GemmaTokenizer, LinearDiT
from weights import pretrain


def test_the_carried_model_fits_into_40_megabytes():
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
    assert pretrain.tags(Path(name)) == expected


def test_the_autoencoder_starts_as_its_shortcuts_and_trains(tmp_path):
    model = pretrain.new_autoencoder()
    x = pretrain.to_signed(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8))
    model.decode(model.encode(x)).sub(x).abs().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_learning_rate_warms_up_and_decays():
    rates = [pretrain.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == 1 / 200 and max(rates) == 1 and rates[-1] == 0.05
    assert rates[749] == 1 and rates[875] == pytest.approx(0.5)
