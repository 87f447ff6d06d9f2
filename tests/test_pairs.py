"""Photos to train on: what is scanned, held out, cropped, paired and tagged."""
import hashlib
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import save_photo
from PIL import Image

import weights
from photos import degrade, pairs, tagger
from photos.pairs import Pairs, held_out, match_lq, photo_tags, scan, validation_pairs
from photos.pictures import read
from runs import UserError


@pytest.fixture
def found(photos, tmp_path):
    return scan([photos], 96, tmp_path / "index.json", 1)[0]


def named(found, name):
    return next(p for p in found if p.path.endswith(name))


def stream(found, **options):
    return Pairs(found, [""] * len(found), 96, (8, 3, 3), (70, 650), 5, **options)


def test_scan_drops_and_counts(photos, tmp_path):
    found, report = scan([photos, photos / "deep"], 96, tmp_path / "index.json", 2)
    assert len(found) == 5 and len({p.sha256 for p in found}) == 5
    assert report == "5 photos of 8 files; skipped: 1 duplicates, 1 unreadable, 1 smaller than 96 pixels"
    assert [p.sha256 for p in found] == sorted(p.sha256 for p in found)


def test_scan_reads_only_what_changed(tmp_path, monkeypatch):
    folder, index, looked = tmp_path / "hq", tmp_path / "index.json", []
    for i in range(3):
        save_photo(folder / f"{i}.png", 96, 96, i)
    (folder / "broken.jpg").write_bytes(b"not a picture")
    first, _ = scan([folder], 96, index, 1)
    inspect = pairs.inspect
    monkeypatch.setattr(pairs, "inspect", lambda p: looked.append(p.name) or inspect(p))
    assert scan([folder], 96, index, 1)[0] == first and looked == ["broken.jpg"]
    for i in (1, 2):
        save_photo(folder / f"{i}.png", 112, 96, i)  # another picture of the same name
    second, _ = scan([folder], 96, index, 1)
    assert {Path(p.path).name for p in {*second} - {*first}} == {"1.png", "2.png"}
    assert sorted(looked) == ["1.png", "2.png", "broken.jpg", "broken.jpg"]


def test_scan_without_photos_is_an_error(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, crop in ((tmp_path / "missing", 96), (tmp_path / "empty", 96), (photos, 4096)):
        with pytest.raises(UserError, match=f"^--data .*{path.name}"):
            scan([path], crop, tmp_path / "index.json", 1)


def test_one_photo_in_16_is_held_out_by_its_hash():
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(3200)]
    held = held_out(hashes)
    assert 150 < len(held) < 250
    assert held == held_out(reversed(hashes)) and held & set(hashes[:1600]) == held_out(hashes[:1600])


@pytest.mark.parametrize("count, expected", [(1, 0), (2, 1), (15, 1), (40, 2)])
def test_tiny_sets_hold_out_their_smallest_hashes(count, expected):
    for start in ("11", "00"):  # the rule would hold out none, or all
        hashes = [f"{start}{i:02x}" for i in range(count)]
        assert held_out(hashes) == set(hashes[:expected])


def test_every_epoch_takes_each_photo_once_in_another_order(found):
    data = stream(found)
    epochs = [[data.place(n)[1] for n in range(5 * e, 5 * e + 5)] for e in range(4)]
    assert all(sorted(e) == list(range(5)) for e in epochs) and len({tuple(e) for e in epochs}) > 1


def test_samples_do_not_depend_on_workers_or_on_each_other(found):
    data = stream(found)
    loaders = [torch.utils.data.DataLoader(data, batch_sampler=iter([[7, 3], [12, 0]]), num_workers=w) for w in (0, 2)]
    a, b = (list(loader) for loader in loaders)
    alone = data[12]
    for k in ("x_L", "x_H", "t", "noise", "shift"):
        assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True))
        assert torch.equal(a[1][k][0], torch.as_tensor(alone[k]))
    assert a[0]["x_L"].shape == (2, 3, 96, 96) and a[0]["noise"].shape == (2, 8, 3, 3)
    assert not torch.equal(data[2]["x_H"], data[12]["x_H"]), "another epoch, another crop"


def test_crops_flips_t_and_shifts_cover_their_ranges(found):
    data = stream(found)
    ends = Pairs(found, [""] * 5, 96, (8, 3, 3), (70, 71), 5)
    assert {float(ends[n]["t"]) for n in range(24)} == {70, 71}, "both ends belong to the range"
    samples = [data[n] for n in range(200)]
    drawn = [s["t"] for s in samples]
    assert all(70 <= v <= 650 and v == int(v) for v in drawn) and len(set(drawn)) > 100
    assert {int(v) for s in samples for v in s["shift"]} == set(range(32))
    photo = named(found, "a.png")
    i, picture = found.index(photo), degrade.to_tensor(Image.open(photo.path)) * 2 - 1
    places = [picture[:, y:y + 96, x:x + 96] for y in range(0, 17, 4) for x in range(0, 33, 4)]
    crops = [s["x_H"] for n, s in enumerate(samples) if data.place(n)[1] == i]
    upright, mirrored = ([any(torch.equal(way(x), p) for p in places) for x in crops]
                         for way in (torch.Tensor.clone, lambda x: x.flip(-1)))
    assert all(u or m for u, m in zip(upright, mirrored, strict=True)) and any(upright) and any(mirrored)


def test_tiles_give_the_same_crops_and_are_cut_once_for_each_photo(tmp_path, monkeypatch):
    """Also without the photo; another photo of the same name gets tiles of its own."""
    path, cache = tmp_path / "hq" / "a.png", tmp_path / "cache"
    monkeypatch.setattr(pairs, "TILE", 100)  # two crops are more: 192
    for seed in (0, 1):
        save_photo(path, 324, 204, seed)
        found = scan([path.parent], 96, tmp_path / "index.json", 1)[0]
        whole, tiled = ([stream(found, **options)[n]["x_H"] for n in range(20)] for options in ({}, {"cache": cache}))
        assert all(torch.equal(a, b) for a, b in zip(whole, tiled, strict=True))
        assert len(list(cache.rglob("*.png"))) == 6 * (seed + 1) and len({x.sum() for x in whole}) > 10
        path.unlink()
        assert torch.equal(stream(found, cache=cache)[3]["x_H"], whole[3])
    save_photo(path, 324, 204, 1)
    with pytest.raises(OSError, match="nor its tiles in --cache .*index.json read or written: Not a directory"):
        stream(found, cache=tmp_path / "index.json")[0]
    assert {Image.open(tile).size for tile in cache.rglob("*.png")} == {(a, b) for a in (192, 132) for b in (192, 108)}


def test_the_mild_share_reaches_training_and_validation_pairs(found):
    data, other = stream(found, mild=1.0), stream(found)
    assert torch.equal(data[3]["x_H"], other[3]["x_H"]) and not torch.equal(data[3]["x_L"], other[3]["x_L"])
    assert (data[3]["x_L"] - data[3]["x_H"]).square().mean() < (other[3]["x_L"] - data[3]["x_H"]).square().mean()
    (_, lr, hr), = validation_pairs(found[:1], {}, 96, 5, None, mild=1.0)
    want = degrade.degrade(degrade.to_tensor(hr), (5, 2 ** 32 - 1, 0), mild=1.0)
    assert torch.equal(degrade.to_tensor(lr), want)


def test_real_pairs_are_cut_together(found, tmp_path):
    photo, small = named(found, "a.png"), tmp_path / "lq" / "a_LR4.png"
    small.parent.mkdir()
    with Image.open(photo.path) as image:
        image.resize((32, 28), Image.BOX).save(small)
    lq = match_lq(found, tmp_path / "lq")
    assert lq == {photo.path: str(small)}
    data = stream(found, lq=lq)
    sample = data[next(n for n in range(5) if found[data.place(n)[1]] == photo)]
    difference = torch.nn.functional.avg_pool2d(sample["x_L"] - sample["x_H"], 4)
    assert difference.abs().mean() < 0.03, "no blur, noise or shift: the real LR picture was used"


def test_real_pictures_must_be_a_quarter_and_their_names_unique(found, tmp_path):
    def refused(message, photos=found):
        with pytest.raises(UserError, match=message):
            match_lq(photos, tmp_path)
    photo, small, turned = named(found, "a.png"), tmp_path / "a_LR4.png", Image.Exif()
    Image.new("RGB", (33, 28)).save(small)
    refused("33x28")
    turned[0x0112] = 6
    Image.new("RGB", (28, 32)).save(small, exif=turned)
    assert match_lq(found, tmp_path) == {photo.path: str(small)}, "32x28 once it is upright"
    refused("have the same name", [*found, photo._replace(path="elsewhere/a.png")])
    Image.new("RGB", (32, 28)).save(tmp_path / "a.png")
    refused("a.png and .*a_LR4.png have the same name")
    (tmp_path / "a.png").unlink()
    small.rename(tmp_path / "unknown.png")
    refused("no picture there")


def test_validation_pictures_are_those_of_this_run(found, tmp_path):
    for n in (3, 2):
        validation_pairs(found[:n], {}, 96, 5, tmp_path / "val")
        assert [len(list((tmp_path / "val" / kind).iterdir())) for kind in ("lr", "hr")] == [n, n]


def test_tags_of_a_file(found, tmp_path, capsys):
    table = tmp_path / "tags.csv"
    table.write_text('image,tags\na.png,"tree, blurry, road"\nb.webp,cat\n')
    tags = photo_tags(str(table), "hq", found, {}, None)
    tags = dict(zip((Path(p.path).name for p in found), tags, strict=True))
    assert tags == {"a.png": ["tree", "road"], "b.webp": ["cat"], "c.jpg": [], "d.png": [], "e.PNG": []}
    assert "3 of 5" in capsys.readouterr().out
    table.write_text("image,tags\nhq/a.png,tree\nlr/a.png,road\n")
    with pytest.raises(UserError, match="two pictures are called a.png"):
        photo_tags(str(table), "hq", found, {}, None)
    table.write_text("name,words\n")
    with pytest.raises(UserError, match="image and tags"):
        photo_tags(str(table), "hq", found, {}, None)


def test_tags_by_a_tagger_are_made_once_for_each_tagger_and_picture(found, tmp_path, seen):
    photo, lq, cache = named(found, "a.png"), tmp_path / "a_LR4.png", tmp_path / "tags.json"

    def tags():
        ways = [("ram", "hq", {}), ("dape", "hq", {}), ("ram", "lq", {}), ("ram", "lq", {photo.path: str(lq)})]
        return [photo_tags(kind, protocol, [photo], real, cache)[0] for kind, protocol, real in ways]
    Image.new("RGB", (photo.width // 4, photo.height // 4)).save(lq)
    first = tags()
    assert [line[0] for line in first] == ["ram", "dape", "ram", "ram"] and len({line[2] for line in first}) == 4
    assert [image == read(photo.path).rgb for image in seen] == [True, True, False, False], "lq: the degraded picture"
    assert tags() == first and len(seen) == 4, "nothing was looked at twice"
    Image.new("RGB", (photo.width // 4, photo.height // 4), "red").save(lq)
    assert tags()[:3] == first[:3] and tags()[3] != first[3] and len(seen) == 5, "another LR picture, other tags"
    photo = photo._replace(sha256="0" * 64)
    assert not {line[2] for line in tags()} & {line[2] for line in first}, "another photo of the same name"
    seen.clear()
    assert photo_tags("ram", "hq", found, {}, tmp_path / "all.json") == [
        ["ram", f"{p.width}", f"tag {i}"] for i, p in enumerate(found, 1)]


def test_without_the_taggers_weights_there_are_no_tags(found, tmp_path, monkeypatch):
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", Mock(side_effect=weights.Unavailable("not here")))
    assert photo_tags("ram", "hq", found, {}, tmp_path / "tags.json") is None
    assert not (tmp_path / "tags.json").exists(), "once the weights are there, tags are found"
