"""The config.json files of the official models: their keys, the default values, and the check of what a file says.

    linear_dit(config)      -> the complete config of a LinearDiT, or a ValueError that names the key

_DEFAULTS: the keys that a network reads. _SUPPORTED: keys of which the code supports certain values only. _UNUSED: keys
without effect on the computation.
"""
import math

NULLABLE = {"out_channels", "attn_logit_softcapping"}  # numbers that may also be null
MAX_SIZE, MAX_LAYERS, MAX_STAGES = 2**20, 1000, 16  # a larger number is broken, and its network would take all memory


def valid(key, value, default):
    """Whether a value has the type of its default and a size that a network can have."""
    if value is None:
        return default is None or key in NULLABLE
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return type(value) is int and 0 < value <= (MAX_LAYERS if key.endswith("layers") else MAX_SIZE)
    if isinstance(default, float):
        return type(value) in (int, float) and value < math.inf and (value > 0 or value == 0 and key.endswith("eps"))
    if isinstance(default, tuple):  # a number for each stage; of qkv_multiscales a list of numbers
        if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_STAGES:
            return False
        least, most = 0 if "layers" in key else 1, MAX_SIZE if "channels" in key else MAX_LAYERS
        numbers = [n for v in value for n in (v if isinstance(v, list | tuple) else [v])]
        return all(type(n) is int and least <= n <= most for n in numbers)
    return True


def read_config(name, config, defaults, supported=None, unused=()):
    """`config` completed by `defaults`; every other key must be known.

    supported: key -> the value that this code supports, or a tuple of them. A config may give one for each stage.
    unused: keys that do not affect the computation. Keys that start with "_" do not, either.
    Raises ValueError naming a key that this code does not support, or a value that is not a number.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{name} config: not an object of keys and values")
    supported = supported or {}
    for key, value in config.items():
        if key in defaults and not valid(key, value, defaults[key]):
            raise ValueError(f"{name} config: {key} = {repr(value)[:100]} cannot be used")
        if key in supported:
            known = supported[key] if isinstance(supported[key], tuple) else (supported[key],)
            if unknown := [v for v in (value if isinstance(value, list | tuple) else [value]) if v not in known]:
                raise ValueError(f"{name} config: {key} = {unknown[0]!r} is not supported, only "
                                 f"{' and '.join(map(repr, known))}")
        elif not (key in defaults or key in unused or key.startswith("_")):
            raise ValueError(f"{name} config: unknown key {key!r} (value {value!r})")
    return defaults | {key: value for key, value in config.items() if key in defaults}


# --- LinearDiT ---

DIT_DEFAULTS = dict(
    in_channels=32, out_channels=32, num_layers=20, num_attention_heads=70, attention_head_dim=32,
    num_cross_attention_heads=20, cross_attention_head_dim=112, cross_attention_dim=2240, caption_channels=2304,
    mlp_ratio=2.5, attention_bias=False, norm_eps=1e-6,
    sample_size=16,  # side of the latents it was trained at; only train.py's default crop depends on it
)
DIT_SUPPORTED = dict(patch_size=1, norm_elementwise_affine=False, dropout=0.0, guidance_embeds=False, qk_norm=None,
                     interpolation_scale=None, timestep_scale=1.0)
DIT_UNUSED = {"guidance_embeds_scale"}


def linear_dit(config):
    config = read_config("LinearDiT", config, DIT_DEFAULTS, DIT_SUPPORTED, DIT_UNUSED)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["cross_attention_dim"] != width:
        raise ValueError(f"LinearDiT config: cross_attention_dim must be the width of the blocks, {width}")
    return config


# --- DC-AE ---

DCAE_DEFAULTS = dict(
    in_channels=3, latent_channels=32, attention_head_dim=32, scaling_factor=1.0,
    encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
    decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    upsample_block_type="pixel_shuffle", downsample_block_type="pixel_unshuffle",
    encoder_out_shortcut=True, decoder_in_shortcut=True,
)
DCAE_SUPPORTED = dict(
    encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
    upsample_block_type=("pixel_shuffle", "interpolate"), downsample_block_type=("pixel_unshuffle", "Conv"),
    decoder_norm_types="rms_norm", decoder_act_fns="silu", decoder_conv_act_fn="relu")


def dcae(config):
    return read_config("DCAE", config, DCAE_DEFAULTS, DCAE_SUPPORTED)


# --- Gemma-2 ---

GEMMA2_DEFAULTS = dict(
    vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6, rope_theta=10000.0, query_pre_attn_scalar=256,
    sliding_window=4096, attn_logit_softcapping=50.0, layer_types=None,
)
GEMMA2_SUPPORTED = dict(
    attention_bias=False, attention_dropout=0.0, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
    use_bidirectional_attention=None, is_encoder_decoder=False, add_cross_attention=False, model_type="gemma2",
    rope_scaling=None, partial_rotary_factor=1.0, tie_word_embeddings=True,
)
# `final_logit_softcapping` belongs to the language-model head, which a text encoder does not have
GEMMA2_UNUSED = set("""architectures bos_token_id eos_token_id pad_token_id chunk_size_feed_forward dtype torch_dtype
    final_logit_softcapping id2label label2id initializer_range max_position_embeddings output_attentions
    output_hidden_states problem_type return_dict transformers_version use_cache cache_implementation""".split())


def gemma2(config):
    rope = config.get("rope_parameters") if isinstance(config, dict) else None  # the newer spelling of rope_theta
    if rope is not None:
        config = config | read_config("Gemma2 rope", rope, dict(rope_theta=10000.0), dict(rope_type="default"))
    config = read_config("Gemma2", config, GEMMA2_DEFAULTS, GEMMA2_SUPPORTED, GEMMA2_UNUSED | {"rope_parameters"})
    if kinds := config["layer_types"]:
        known = isinstance(kinds, list | tuple) and {*map(str, kinds)} <= {"sliding_attention", "full_attention"}
        if not known or len(kinds) < config["num_hidden_layers"]:
            raise ValueError(f"Gemma2 config: layer_types = {repr(kinds)[:100]} cannot be used")
    return config
