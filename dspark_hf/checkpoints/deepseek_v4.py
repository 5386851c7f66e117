"""DeepSeek V4: the head lies in its target's own checkpoint, in the tensors `mtp.*`. Embedding and LM head are the
target's.

Depth goes by the tensors: `num_nextn_predict_layers` is about an earlier kind of head. Weights are FP8 with a scale a
block, experts FP4 with a scale for 32 columns; both are powers of two, so that dequantised values are exact.
"""

from collections.abc import Iterator
from typing import Any

import torch

from .errors import CheckpointError, config_file
from .headers import TensorHeader
from .schema import check_value, forbid_code, require
from .stored import FP8, GROUP, PACKED_FP4, SCALE, Part, StoredWeight
from .writing import CALIBRATION, CannotExpress, require_values

NAME = "deepseek_v4"
DESCRIPTION = "DeepSeek V4 (model_type 'deepseek_v4' with dspark_* keys, the head in its own checkpoint as mtp.*)"
MODEL_TYPE, ARCHITECTURE = "deepseek_v4", "DeepseekV4ForCausalLM"
# The head's tensors begin so; all others are the target's.
INSIDE = "mtp."
PREFIXES: dict[str, str] = {}
NAMES = {
    "block_size": "dspark_block_size",
    "mask_token_id": "dspark_noise_token_id",
    "target_layer_ids": "dspark_target_layer_ids",
    "markov_rank": "dspark_markov_rank",
    "num_target_layers": "num_hidden_layers",
    "intermediate_size": "moe_intermediate_size",
    "num_hidden_layers": "the stages of mtp.*",
}
REQUIRED = (
    "dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank", "num_hidden_layers",
    "vocab_size", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_attention_heads", "head_dim",
    "rms_norm_eps", "sliding_window", "rope_theta",
)  # fmt: skip
# Keys that a stage has no use for, or that are written anew.
NOT_OF_A_STAGE = (
    "architectures", "quantization_config", "expert_dtype", "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip
# Where neither the tensors nor the config are asked: as released.
STAGES = 3
BLOCK = (128, 128)

# Tensors of every stage, of the first one and of the last one: what the file calls them, and this project.
STAGE = {
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{part}_{kind}": f"{part}_hc.{kind}" for part in ("attn", "ffn") for kind in ("fn", "base", "scale")},
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
}
FIRST = {"main_proj.weight": "fc.weight", "main_norm.weight": "hidden_norm.weight"}
LAST = {
    "norm.weight": "norm.weight",
    "markov_head.markov_w1.weight": "markov_head.markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_head.markov_w2.weight",
    "confidence_head.proj.weight": "confidence_head.proj.weight",
    **{f"hc_head_{kind}": f"hc_head.hc_{kind}" for kind in ("fn", "base", "scale")},
}
# Matrices of every expert that lie one above the other in one tensor of this project.
EXPERTS = {"mlp.experts.gate_up_proj": ("w1", "w3"), "mlp.experts.down_proj": ("w2",)}


def recognises(published: dict[str, Any]) -> bool:
    return published.get("model_type") == MODEL_TYPE and "dspark_block_size" in published


def names(published: dict[str, Any]) -> dict[str, str]:
    """What the layout calls this project's keys, where that differs."""
    return NAMES


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """Published keys -> keys of a `DSparkConfig`. As many stages as the config implies; see `told_by`."""
    require(published, REQUIRED, source)
    forbid_code(published, (), source)
    ratios = published.get("compress_ratios")
    check_value(published, "compress_ratios", ratios is None or isinstance(ratios, list), "a list", source)
    beyond = len(ratios or ()) - published["num_hidden_layers"]
    own = {key: value for key, value in published.items() if not key.startswith("dspark_")}
    stage = {key: value for key, value in own.items() if key not in (*NOT_OF_A_STAGE, *CALIBRATION)}
    return {
        "model_type": "dspark",
        "architectures": ["DSparkHead"],
        "backbone": NAME,
        "stage_config": stage,
        "block_size": published["dspark_block_size"],
        "mask_token_id": published["dspark_noise_token_id"],
        "target_layer_ids": published["dspark_target_layer_ids"],
        "num_target_layers": published["num_hidden_layers"],
        "markov_rank": published["dspark_markov_rank"],
        "markov_head_type": "vanilla",
        "confidence_head_bias": False,
        "borrow_embeddings": True,
        "num_key_value_heads": 1,
        "intermediate_size": published["moe_intermediate_size"],
        "rope_parameters": {"rope_type": "default", "rope_theta": published["rope_theta"]},
        "sliding_window": published["sliding_window"],
        "window_counted_from": "block",
        "sliding_is_causal": False,
        "dtype": published.get("dtype") or published.get("torch_dtype"),
        **{key: own[key] for key in (*COMMON, *CALIBRATION) if own.get(key) is not None},
        **_depth(beyond if beyond > 0 else STAGES),
    }


COMMON = (
    "vocab_size", "hidden_size", "num_attention_heads", "head_dim", "rms_norm_eps", "hidden_act",
    "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def _depth(stages: int) -> dict[str, Any]:
    return {"num_hidden_layers": stages, "layer_types": ["sliding_attention"] * stages}


def told_by(weights: dict[str, StoredWeight]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` that the tensors tell: depth."""
    return _depth(len({name.split(".")[1] for name in weights if name.startswith("layers.")}))


def write_config(native: dict[str, Any]) -> dict[str, Any]:
    """Keys of a `DSparkConfig` -> the target's `config.json`, with those of the head.

    Raises:
        CannotExpress: for a head of other layers.
    """
    if native["backbone"] != NAME:
        raise CannotExpress(
            "The DeepSeek V4 layout cannot express this head: its stages are layers of DeepSeek V4, but the head has "
            f"backbone={native['backbone']!r}."
        )
    require_values("DeepSeek V4", native, draft_vocab_size=None, confidence_head_bias=False)
    require_values("DeepSeek V4", native, window_counted_from="block", sliding_is_causal=False, sample_from_anchor=True)
    return {
        **native["stage_config"],
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{key: native[own] for own, key in NAMES.items() if key.startswith("dspark_")},
        **{key: native[key] for key in CALIBRATION if native.get(key) is not None},
        "torch_dtype": native["dtype"],
    }


# -- Tensors ----------------------------------------------------------------------------------------------------


def layout(stages: int, experts: int) -> Iterator[tuple[str, list[str]]]:
    """This project's tensors, and of each what the file calls its parts."""
    for i in range(stages):
        at = f"{INSIDE}{i}."
        yield from ((f"layers.{i}.{own}", [at + name]) for name, own in STAGE.items())
        for own, kinds in EXPERTS.items():
            parts = [f"{at}ffn.experts.{e}.{kind}.weight" for e in range(experts) for kind in kinds]
            yield f"layers.{i}.{own}", parts
    for stage, table in ((0, FIRST), (stages - 1, LAST)):
        yield from ((own, [f"{INSIDE}{stage}.{name}"]) for name, own in table.items())


def gather(stored: dict[str, TensorHeader], published: dict[str, Any], source: str) -> dict[str, StoredWeight]:
    """The head's tensors by this project's names, from headers by the file's.

    Raises:
        CheckpointError: for tensors that are missing, left over or of another type or scale than the layout has.
    """
    stages = _stages(stored, source)
    experts, block = published["n_routed_experts"], _block(published, source)
    file, left, weights = next(iter(stored.values())).file, dict(stored), {}
    for own, part_names in layout(stages, experts):
        parts = []
        for name in part_names:
            header = left.pop(name, None)
            if header is None:
                raise CheckpointError(file, name, "no tensor", "one", ELSEWHERE)
            scale_name = f"{name.removesuffix('.weight')}.scale"
            parts.append(_checked(Part(name, header, scale_name), left.pop(scale_name, None), block))
        weights[own] = StoredWeight(parts, block, experts if own.endswith(tuple(EXPERTS)) else None)
    for name, header in left.items():
        raise CheckpointError(header.file, name, "a tensor", "no tensor of this name", ELSEWHERE)
    return weights


ELSEWHERE = "Heads of DeepSeek V4 are known as in V4-Flash-DSpark and V4-Pro-DSpark; other releases name tensors anew."


def scatter(tensors: dict[str, torch.Tensor], native: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors by the file's names, in its parts, of those by this project's; the inverse of `gather`, unquantised."""
    written: dict[str, torch.Tensor] = {}
    for own, names in layout(native["num_hidden_layers"], native["stage_config"]["n_routed_experts"]):
        tensor = tensors[own]
        if own.endswith(tuple(EXPERTS)):
            parts = [part.clone() for part in tensor.flatten(0, 1).chunk(len(names))]
        else:
            parts = [tensor]
        written |= dict(zip(names, parts, strict=True))
    return written


def _stages(stored: dict[str, TensorHeader], source: str) -> int:
    found = sorted({name.split(".")[1] for name in stored}, key=lambda stage: (len(stage), stage))
    if not found or found != [str(i) for i in range(len(found))]:
        stages = f"{INSIDE}N of N in {found}" if found else "none"
        raise CheckpointError(f"{source.rstrip('/')}", "tensors of the head", stages, f"{INSIDE}0, {INSIDE}1, ...")
    return len(found)


def _block(published: dict[str, Any], source: str) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    found = (published.get("quantization_config") or {}).get("weight_block_size") or BLOCK
    if len(found) != 2 or not all(type(side) is int and side > 0 for side in found):
        key = "quantization_config.weight_block_size"
        raise CheckpointError(config_file(source), key, repr(found), "two positive whole numbers")
    return tuple(found)


def _checked(part: Part, scale: TensorHeader | None, block: tuple[int, int]) -> Part:
    """The part, without the name of a scale where it has none."""
    header = part.header
    if header.dtype not in (FP8, PACKED_FP4):
        if scale is not None:
            raise CheckpointError(scale.file, part.scale_name, "a scale", f"none beside {header.dtype} values")
        return Part(part.name, header)
    if len(header.shape) != 2 or scale is None or scale.dtype != SCALE:
        found = "nothing" if scale is None else f"type {scale.dtype}"
        raise CheckpointError(header.file, part.scale_name, found, f"scales of type {SCALE} for {part.name}")
    rows, columns = header.shape[0], part.columns
    sides = (1, GROUP) if header.dtype == PACKED_FP4 else block
    shape = (-(-rows // sides[0]), -(-columns // sides[1]))
    if scale.shape != shape or (header.dtype == PACKED_FP4 and columns % GROUP):
        raise CheckpointError(
            scale.file, part.scale_name, f"shape {list(scale.shape)}", f"{list(shape)}, one for {sides[0]}x{sides[1]}"
        )
    return part
