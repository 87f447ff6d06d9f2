"""Which files form one set, where they are looked for, and a download from a hub on this machine."""
import http.server
import json
import os
import threading
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import python
from huggingface_hub import constants

import weights
from photos.pictures import write_bytes
from weights import FILES, MODELS, File, Model, Unavailable, folder, pick_files, present


def shards(stem, n, old=""):
    return [f"{stem}-{i:05d}-of-{n:05d}{old}.safetensors" for i in range(1, n + 1)]


PLAIN, FP16, BF16 = "model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"


@pytest.mark.parametrize("names, dtype, expected", [
    ([PLAIN], None, [PLAIN]), ([PLAIN], "fp16", [PLAIN]), ([PLAIN, FP16, BF16], None, [PLAIN]),
    ([PLAIN, FP16, BF16], "fp16", [FP16]), ([PLAIN, FP16, BF16], torch.bfloat16, [BF16]),
    ([PLAIN, FP16, BF16], torch.float32, [PLAIN]), ([FP16], "fp32", [FP16]),  # a folder that holds nothing else
    (["config.json", "pytorch_model.bin", "model.onnx", "model.non_ema.safetensors", PLAIN], None, [PLAIN]),
    # the transformer of Sana_1600M: plain in shards, fp16 whole
    (shards("model", 2) + [FP16, "model.safetensors.index.json"], "fp16", [FP16]),
    (shards("model", 2) + [FP16, "model.safetensors.index.json"], None, shards("model", 2)),
    # its text encoder: both in shards
    (shards("model", 2) + shards("model.fp16", 2), "fp16", shards("model.fp16", 2)),
    (shards("model", 2) + shards("model.fp16", 2), "bf16", shards("model", 2)),
    (shards("model", 12)[::-1], None, shards("model", 12)),
    (shards("diffusion_pytorch_model", 2, ".fp16"), "fp16", shards("diffusion_pytorch_model", 2, ".fp16")),
    ([PLAIN] + shards("model", 2), None, [PLAIN]),  # one file goes before shards, never both
])
def test_pick_files_takes_one_whole_set(names, dtype, expected):
    assert pick_files(names, dtype) == expected


@pytest.mark.parametrize("names, message", [
    ([], "no weights"), (["pytorch_model.bin"], "no weights"),
    (shards("model", 3)[:2], "missing shard model-00003-of-00003.safetensors"),
    (shards("model", 3)[1:], "missing shard model-00001-of-00003.safetensors"),
    (shards("model.fp16", 2)[:1] + [PLAIN], "model.fp16-00002-of-00002"),  # requested and torn: no silent replacement
    (shards("model", 2) + shards("model", 3), "two different sets"),
])
def test_pick_files_names_what_is_missing(names, message):
    with pytest.raises(FileNotFoundError, match=message):
        pick_files(names, "fp16")
    with pytest.raises(ValueError, match="fp8"):
        pick_files(names, "fp8")


def test_the_tables_are_complete():
    for name, known in {**MODELS, **FILES}.items():
        assert known.licence and "/" not in name and (known.repo is None or known.repo.count("/") == 1), name
    assert all(known.filename.endswith((".safetensors", ".pth", ".pt")) for known in FILES.values())


@pytest.mark.parametrize("value, inside", [(None, ".cache/sanasr"), ("", ".cache/sanasr"), ("~/x", "x")])
def test_where_the_cache_lies(tmp_path, monkeypatch, value, inside):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SANASR_CACHE") if value is None else monkeypatch.setenv("SANASR_CACHE", value)
    assert weights.cache_dir() == tmp_path / inside


def make_model(path, *variants):
    stems = dict.fromkeys(weights.PARTS, "diffusion_pytorch_model") | {"text_encoder": "model"}
    for name in ["tokenizer/tokenizer.json", *(f"{part}/config.json" for part in stems),
                 *(f"{part}/{stem}{variant}.safetensors" for part, stem in stems.items() for variant in variants)]:
        write_bytes(path / name, f"content of {name}")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache, no network, the model "tiny" and the file "small" known."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(MODELS, "tiny", Model("MIT", "org/Tiny_diffusers", gigabytes=1.5))
    monkeypatch.setitem(FILES, "small", File("small-weights.pth", "MIT", "org/f", sha256(b"good").hexdigest(), 9))
    return tmp_path


def test_own_folder_comes_first(offline, monkeypatch):
    own = offline / "own"
    make_model(own / "Tiny_diffusers", "")
    (own / "small-weights.pth").write_bytes(b"good")
    monkeypatch.setenv("SANASR_WEIGHTS", str(own))
    assert folder("tiny") == own / "Tiny_diffusers"      # by the repository's name
    assert weights.file("small") == own / "small-weights.pth"
    (own / "tiny").mkdir()
    assert folder("tiny") == own / "tiny"                # by its own name
    (own / "small-weights.pth").write_bytes(b"bad")
    with pytest.raises(Unavailable, match="small-weights.pth: its SHA-256"):
        weights.file("small")
    (own / "small.pth").write_bytes(b"another")          # under its own name the user's substitute, taken as it is
    assert weights.file("small") == own / "small.pth"


def test_cache_is_used_without_a_network_only_if_whole(offline):
    cached = offline / "cache" / "models--org--Tiny_diffusers"
    write_bytes(cached / "refs" / "main", "a" * 40)
    snapshot = cached / "snapshots" / ("a" * 40)
    make_model(snapshot, ".bf16")
    assert folder("tiny", "bf16") == snapshot == present("tiny", "bf16")
    with pytest.raises(Unavailable):                     # float32 asked for: bf16 would be another result
        folder("tiny", "fp32")
    (snapshot / "vae" / "diffusion_pytorch_model.bf16.safetensors").unlink()
    assert present("tiny", "bf16") is None
    with pytest.raises(Unavailable) as error:
        folder("tiny", "bf16")
    assert "\n" not in str(error.value)
    for word in ("tiny", "HF_HUB_OFFLINE", "org/Tiny_diffusers", "1.5 GB", "SANASR_WEIGHTS"):
        assert word in str(error.value)


def test_without_a_network_the_answer_is_quick_and_clear(offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(Unavailable, match="small is not on this machine and http.* cannot be reached .*weights.pth"):
        weights.file("small")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download needs. The first transfer of a long file breaks off."""
    protocol_version = "HTTP/1.1"
    files, ranges = {}, []

    def do_GET(self):
        self.ranges.append(self.headers.get("Range"))
        path, headers, status, body = self.path.split("?")[0], {}, 200, b"hello"
        if "/tree/" in path:
            body = json.dumps([{"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}
                               for name, data in self.files.items()]).encode()
        elif path.startswith("/api/"):
            body = json.dumps({"id": "org/tiny", "sha": "b" * 40}).encode()
        elif "/resolve/" in path:
            body = self.files[path.split("/resolve/")[1].split("/", 1)[1]]
            headers = {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": "b" * 40}
            if wanted := self.headers.get("Range"):
                start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body = body[start:]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            broken = len(body) > 20_000_000
            self.wfile.write(body[:12_000_000] if broken else body)
            self.close_connection = broken

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_download_fetches_what_is_needed_and_goes_on_after_a_break(tmp_path, request):
    make_model(tmp_path / "hub", "", ".fp16")
    long = bytes(22_000_000) + b"end"
    (tmp_path / "hub/transformer/diffusion_pytorch_model.fp16.safetensors").write_bytes(long)
    (tmp_path / "hub/README.md").write_text("not needed")
    Hub.files = {name: (tmp_path / "hub" / name).read_bytes() for name in weights._listing(tmp_path / "hub")}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    request.addfinalizer(server.shutdown)
    code = ("import weights; weights.MODELS['tiny'] = weights.Model('MIT', 'org/tiny')\n"
            "print(weights.folder('tiny', 'fp16'))")
    # the hub's address is read when huggingface_hub is imported, so in a process of its own
    env = dict.fromkeys([k for k in os.environ if k.startswith("HF_")]) | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": tmp_path / "home", "NO_PROXY": "*"}

    def fetch():
        Hub.ranges.clear()
        run = python("-c", code, **env)
        assert run.returncode == 0, run.stderr
        return Path(run.stdout.strip()), run.stderr
    got, shown = fetch()
    assert sorted(weights._listing(got)) == sorted([
        "tokenizer/tokenizer.json",
        "transformer/config.json", "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",        # fp16 is for the transformer alone
        "text_encoder/config.json", "text_encoder/model.safetensors"])
    assert (got / "transformer/diffusion_pytorch_model.fp16.safetensors").read_bytes() == long
    assert any(Hub.ranges), "the broken transfer was begun anew"
    assert "downloading tiny from org/tiny" in shown and "licence: MIT" in shown and "7/7" in shown
    assert fetch() == (got, "") and not Hub.ranges, "what is cached needs no request"


def test_listing_names_all():
    run = python("-m", "weights", HF_HUB_OFFLINE=1)
    assert run.returncode == 0, run.stderr
    assert all(f"  {name} " in run.stdout for name in [*MODELS, *FILES])
    assert "Efficient-Large-Model/Sana_600M_512px_diffusers" in run.stdout
