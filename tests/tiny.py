"""A whole model of the official classes and layout, small enough to write, load and run within a second."""
import json
from pathlib import Path

import torch
from seeded import seeded_module

from sanasr import DCAE, Gemma2, LinearDiT, inject_lora, lora_parameters, save_lora
from weights.files import save_module

WIDTHS = [8, 8, 16, 16, 32, 32]
CONFIGS = {
    "vae": (DCAE, {
        "latent_channels": 8, "scaling_factor": 0.41407, "attention_head_dim": 32,
        "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in {
            "block_out_channels": WIDTHS, "block_types": ["ResBlock"] * 4 + ["EfficientViTBlock"] * 2,
            "layers_per_block": [1] * 6, "qkv_multiscales": [[], [], [], [], [5], [5]]}.items()}}),
    "transformer": (LinearDiT, {
        "in_channels": 8, "out_channels": 8, "sample_size": 4, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "cross_attention_dim": 64, "cross_attention_head_dim": 16,
        "num_cross_attention_heads": 4, "caption_channels": 32}),
    "text_encoder": (Gemma2, {
        "vocab_size": 296, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16}),
}


def byte_tokenizer():
    """A tokenizer.json in Gemma's format: bytes, "▁", lower-case letters and a few merges."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*special, *(f"<0x{b:02X}>" for b in range(256)), "▁", ",", "-", *"abcdefghijklmnopqrstuvwxyz",
              "bl", "ur", "blur", "ry", "tr", "ee", "tree"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = ["b l", "u r", "bl ur", "r y", "t r", "e e", "tr ee"]
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"},
            "added_tokens": [{"id": vocab[piece], "content": piece, "special": True} for piece in special]}


def tiny_model(folder, dtype=torch.float32):
    """Writes transformer/, vae/, text_encoder/ and tokenizer/ with seeded weights into `folder`; returns its path."""
    folder = Path(folder)
    for part, (cls, config) in CONFIGS.items():
        with torch.device("meta"):
            module = cls(config)
        save_module(seeded_module(module), folder / part, dtype)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return folder


def tiny_adapter(path, model, rank=4, targets="attn", metadata=None, gain=0.1):
    """Writes an adapter of the tiny model with random A and B; returns its path."""
    dit = LinearDiT.from_pretrained(Path(model) / "transformer")
    inject_lora(dit, rank, targets=targets)
    for i, p in enumerate(lora_parameters(dit).values()):
        p.data = gain * torch.randn(*p.shape, generator=torch.Generator().manual_seed(i))
    save_lora(dit, path, metadata)
    return path
