"""The two tables of lab/ablation.py, on the tiny model and two small pairs."""
import json

import numpy as np
import pytest
import torch
from conftest import save_photo, table
from PIL import Image

import eval as evaluator
import metrics
import train
from lab import ablation, stages
from photos.degrade import enlarge, to_image, to_tensor
from runs import UserError
from sanasr import SanaSR
from weights.files import open_weights


@pytest.fixture
def run(here, tiny_model, monkeypatch):
    """run(options…) makes the tables in out/; run.calls lists the rows it scored and its runs of train.py."""
    for i in range(3):
        for folder, side, seed in (("hr", 128, i), ("lr", 32, i), ("hq", 128, i + 5)):
            save_photo(here / folder / f"{i}.png", side, side, seed)
    (here / "tags.csv").write_text("image,tags\n0.png,tree\n1.png,blurry tree\n2.png,tree\n")

    def start(*options):
        return ablation.main(["--lr", "lr", "--hr", "hr", "--model", str(tiny_model), "--metrics", "psnr,ssim",
                              "--out", "out", "--device", "cpu", "--limit", "2", *options])
    def noted(name, function):
        return lambda *args, **options: (start.calls.append((name, args[0])), function(*args, **options))[1]
    start.calls = []
    monkeypatch.setattr(train, "main", noted("train", train.main))
    monkeypatch.setattr(ablation, "score", noted("score", ablation.score))
    return start


TRAIN = ["--data", "hq", "--steps", "2", "--tags", "tags.csv", "--train-args",
         "--rank 2 --batch 1 --crop 96 --workers 0 --val 0 --no-lpips"]


def test_both_tables_are_complete_and_nothing_is_made_twice(run, capsys, tmp_path):
    assert run(*TRAIN) == 0
    text = capsys.readouterr().out
    trained = [f"{name}-0" for name in ablation.VARIANTS]
    assert text.count("\n| ") == 3 * 2 + len(ablation.STAGES) + 2 * len(trained)
    assert "| stages | PSNR ↑ | SSIM ↑ |" in text and "2 pairs; ablations of 2 steps" in text
    for title, words in (("stages", ablation.STAGES), ("ablations", trained)):
        rows = table(tmp_path / "out" / f"{title}.csv")
        assert list(rows) == list(words)
        for name, row in rows.items():
            own = table(tmp_path / "out" / title / f"{name}.csv")
            assert list(own) == ["0.png", "1.png", "mean"] and row["psnr"] == own["mean"]["psnr"]
    assert len({row["psnr"] for row in table(tmp_path / "out" / "ablations.csv").values()}) > 5  # the options matter
    for name, key, value in (("tau-600", "timestep", "600.0"), ("lq", "protocol", "lq"), ("tags", "tags", "file"),
                             ("no-suffix", "suffix", "none"), ("attn+ffn", "lora_targets", "attn+ffn")):
        with open_weights(tmp_path / f"out/ablations/{name}-0/adapter.safetensors") as file:
            assert file.metadata()[key] == value
    seen = len(run.calls)
    (tmp_path / "out" / "ablations" / "no-cons-0.csv").unlink()
    assert run(*TRAIN) == 0
    assert [name for name, _ in run.calls[seen:]] == ["train", "score"]
    assert {"--no-cons", "--resume"} <= {*run.calls[seen][1]}
    assert capsys.readouterr().out == text  # the adapter was there: only its row was made again


def test_rows_are_what_eval_says_and_of_one_setting(run, tmp_path, tiny_model):
    assert run("--only", "bicubic", "unsharp", "full", "autoencoder") == 0
    assert list(table(tmp_path / "out" / "stages.csv")) == ["bicubic", "unsharp", "autoencoder", "full"]
    evaluator.main(["lr", "--hr", "hr", "--model", str(tiny_model), "--metrics", "psnr,ssim", "--csv", "full.csv",
                    "--device", "cpu", "--compare", "--out", "full/"])
    mine, theirs = table(tmp_path / "out/stages/full.csv"), table(tmp_path / "full.csv")
    assert all(mine[name] == theirs[name] for name in ("0.png", "1.png"))
    for i in range(2):
        x, y = (to_tensor(Image.open(tmp_path / name))[None] for name in (f"full/{i}_x4_bicubic.png", f"hr/{i}.png"))
        psnr = float(table(tmp_path / "out/stages/bicubic.csv")[f"{i}.png"]["psnr"])
        assert psnr == pytest.approx(metrics.load("psnr")(x, y).item(), abs=1e-4)
    with pytest.raises(SystemExit, match="out/stages holds rows that were made with another pairs"):
        run("--only", "ceiling", "--limit", "3")
    assert json.loads((tmp_path / "out/stages/settings.json").read_text())["pairs"] == "2"


def test_without_update_the_result_is_that_of_the_autoencoder(tiny_model):
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    model = SanaSR.from_pretrained(tiny_model)
    for image, scale in ((small, 4), (small.resize((96, 64)), 1)):
        mine = ablation.without_update(model).restore(image, scale=scale)
        with torch.no_grad():
            want = to_image(model.vae.decode(model.vae.encode(enlarge(image, (96, 64))[None]))[0] / 2 + 0.5)
        assert mine.size == (96, 64) and np.abs(np.asarray(mine, int) - np.asarray(want, int)).max() <= 1
    assert not isinstance(model.dit, type(lambda: 0))  # the model itself is as it was


def test_stages_go_on_where_they_stopped(here, monkeypatch, capsys):
    made, codes = [], {"b": 130, "c": 3}
    monkeypatch.setattr(train, "main", lambda line: (made.append(line), codes.get(line[0]) or (
        here / line[0]).touch())[1])
    todo = [stages.Stage(name, ["train", name], here / name, here / "state", hours) for name, hours in (
        ("a", 1), ("b", 2), ("c", 0.5))]
    with pytest.raises(KeyboardInterrupt):
        stages.run(todo)
    assert capsys.readouterr().out.startswith("3 of 3 stages to run, about 3.5 hours\n  a, about 1.0 hours\n  b,")
    (here / "state").touch()
    del codes["b"]
    with pytest.raises(UserError, match="c: exit code 3"):
        stages.run(todo)
    assert made == [["a"], ["b"], ["b", "--resume"], ["c", "--resume"]]
    monkeypatch.setattr(train, "main", lambda line: None)
    with pytest.raises(UserError, match="c did not leave .*c$"):
        stages.run(todo)
    assert capsys.readouterr().out.count("1 of 3 stages to run, about 0.5 hours") == 1


def test_differences_are_of_means_over_the_seeds_apart_for_each_kind(here):
    for name, values in (("method-0", (1, 2, 3)), ("method-1", (3, 4, 5)), ("lq-0", (0, 0, 1)), ("lq-1", (2, 2, 1))):
        path = here / "out/ablations" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        images = ("a_strong.png", "b_strong.png", "c_soft.png", "mean")
        path.write_text("image,lpips\n" + "".join(f"{i},{v}\n" for i, v in zip(images, (*values, 9), strict=True)))
    rows = ablation.differences(here / "out", (0, 1), ["lpips"]).split("\n")
    assert rows[0] == "| minus the method | soft LPIPS | strong LPIPS |"
    assert rows[2] == "| LQ protocol (τ 999, t 20 to 980) | -3.0000 [-3.0000, -3.0000] | -1.5000 [-2.0000, -1.0000] |"
    assert rows[3].startswith("| the method, seed 1 minus seed 0 | +2.0000 [")
    assert len(rows) == 4  # an ablation without all its rows is left out
