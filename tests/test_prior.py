"""lab/prior.py: tokenizer, tags, a short training and its export."""
import json
from unittest.mock import Mock

import pytest
import torch
from conftest import state
from PIL import Image

from lab import prior
from runs import read_log
from sanasr import DCAE, GemmaTokenizer, SanaSR
from trainer import Trainer


def test_tokenizer_training_merges_the_frequent_and_loses_nothing(tmp_path):
    lines = ["tree", "tree house", "treetop", "house", "Zürich"]
    bpe = prior.train_tokenizer(lines, 290)
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
def test_tags_are_a_files_name_and_its_colours(name, expected):
    assert prior.tags(name, Image.new("RGB", (8, 8), (60, 100, 140))) == [*expected, "blue"]
    image = Image.new("RGB", (40, 40))
    assert prior.tags("1.png", image) == ["dark"]
    image.paste((250, 20, 30), (0, 0, 24, 40))
    image.paste((200, 200, 200), (24, 0, 40, 40))
    assert prior.tags("1.png", image) == ["red", "gray", "bright"]


def test_small_photos_are_mirrored():
    x = torch.arange(12.0).view(1, 3, 4)
    y = prior.mirrored(x, 5)
    assert y.shape == (1, 5, 5) and y[0, 1].tolist() == [0, 1, 2, 3, 3] and y[0, :, 0].tolist() == [0, 0, 4, 8, 8]
    assert torch.equal(prior.mirrored(x, 3), x)


@pytest.fixture
def run(photos, here, tiny_model, monkeypatch):
    """run(…) trains a tiny prior on the tiny model's autoencoder, returns its folder."""
    monkeypatch.setattr(prior, "PRIOR", prior.PRIOR | dict(in_channels=8, out_channels=8, num_layers=1, sample_size=3))
    monkeypatch.setattr(prior, "TEXT_ENCODER", prior.TEXT_ENCODER | dict(vocab_size=360, num_hidden_layers=1))

    def start(*options):
        assert prior.main(["train", "--data", str(photos), "--vae", str(tiny_model), "--latents", "8", "--batch", "2",
                           "--every", "15", "--lr", "0.02", "--workers", "1", "--device", "cpu", *options]) == 0
        return here / "runs" / "prior"
    return start


def test_it_trains_resumes_and_becomes_a_model(run, tmp_path):
    whole = run("--steps", "30").rename(tmp_path / "whole")
    folder = run("--steps", "15")
    latents = (folder / "latents.pt").stat().st_mtime_ns
    run("--steps", "30")
    assert (folder / "latents.pt").stat().st_mtime_ns == latents
    a, b = (state(f)["masters"] for f in (whole, folder))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(SystemExit, match="begun with other settings: --lr 0.1"):
        run("--steps", "45", "--lr", "0.1")
    rows = read_log(folder / "log.csv")
    assert [row["step"] for row in rows] == list(range(31))
    assert {"val_right", "val_empty", "val_shuffled"} <= set(rows[-1]) and rows[-1]["val_right"] < rows[0]["val_right"]
    adapter = tmp_path / "model" / "adapter.safetensors"
    assert prior.main(["export", "--to", "model"]) == 0
    adapter.write_bytes(b"of this transformer")
    assert prior.main(["export", "--to", "model"]) == 0 and adapter.is_file()
    adapter.unlink()
    model = SanaSR.from_pretrained(tmp_path / "model")
    assert model.restore(Image.new("RGB", (24, 24)), "tree").size == (96, 96)
    z = state(folder, "latents.pt")["z"].float()
    assert model.scaling_factor == pytest.approx(1 / z.std().item(), abs=1e-5)


@pytest.mark.parametrize("name, lower", [("fp32", False), ("bf16", True)])
def test_latents_are_encoded_in_the_dtype_that_is_asked_for(run, monkeypatch, name, lower):
    seen, encode = set(), DCAE.encode
    monkeypatch.setattr(DCAE, "encode", lambda *a: seen.add(torch.is_autocast_enabled("cpu")) or encode(*a))
    run("--steps", "1", "--dtype", name)
    assert seen == {lower}


def test_the_log_keeps_rows_and_columns_apart_where_a_run_is_resumed(tmp_path):
    """No value stands below another's name, no step is noted twice: not that of a run killed before its second save."""
    def fit(terms, steps, batches):
        p = torch.nn.Parameter(torch.ones(1))
        Trainer(tmp_path, {"p": p}, lambda batch: {"loss": p.sum(), **{k: p.sum() * v for k, v in terms.items()}}, {},
                steps=steps, every=1, lr=0.1, device=torch.device("cpu"), samples=1, terms=terms).run(batches)
        return read_log(tmp_path / "log.csv")
    assert [row["step"] for row in fit({"a": 2, "b": 3}, 1, Mock(side_effect=KeyboardInterrupt))] == [0]
    fit({"a": 2, "b": 3}, 1, lambda *_: iter([{}]))
    _, first, second = rows = fit({"b": 3, "c": 4}, 2, lambda *_: iter([{}]))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert "a" not in first and first["b"] == 3 * first["loss"]
    assert second["b"] == pytest.approx(3 * second["loss"]) and second["c"] == pytest.approx(4 * second["loss"])
    assert (tmp_path / "log.csv").read_text().count("step") == 1


def test_the_learning_rate_warms_up_and_decays(tmp_path):
    p, rates = torch.nn.Parameter(torch.ones(1)), {}
    trainer = Trainer(tmp_path, {"p": p}, None, {}, steps=1000, every=1000, lr=1.0, device=torch.device("cpu"),
                      samples=1, warmup=prior.WARMUP, decay=prior.DECAY)
    for trainer.step in (0, 198, 199, 749, 875, 999):
        step, trainer.masters[0].grad = trainer.step, torch.zeros(1)
        trainer.update()
        rates[step] = trainer.optimizer.param_groups[0]["lr"]
    assert rates == pytest.approx({0: 1 / 200, 198: 199 / 200, 199: 1, 749: 1, 875: 0.5, 999: 1 / 250})


def test_tags_are_written_for_all_pictures(photos, tmp_path, capsys):
    path = tmp_path / "tags.csv"
    assert prior.main(["tags", "--data", str(photos), "--to", str(path)]) == 0
    assert len(path.read_text().splitlines()) == 8 and "7 pictures, 1 unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    (["train"], "--data is needed"), (["export"], "--to names what to write"),
    (["train", "--data", "x", "--lr", "-1"], "--lr must be above 0")])
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        prior.main(options)
    assert message in f"{end.value.code} {capsys.readouterr().err}"
