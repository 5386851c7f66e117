"""Heads that we export in speculators' layout, loaded and run by speculators' own class.

    python tests/compat/speculators_load.py [FOLDER OF A VENV]

Run it with the project's environment. The venv, which is made unless it is there, holds speculators and the older
transformers that it needs. Both sides compute the same blocks; tensors, config and numbers must agree.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REQUIREMENTS = ("torch==2.13.0", "speculators==0.9.0")
HEADS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated", "confidence_head_with_markov": False},
    "rnn": {"markov_head_type": "rnn"},
    "unsure": {"enable_confidence_head": False},
    "parallel": {"markov_rank": 0},
    "dflash": {"markov_rank": 0, "enable_confidence_head": False, "sample_from_anchor": False},
    "reduced": {"draft_vocab_size": 40},
    "sliding": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "window_counted_from": "block",
    },
}
VOCAB, LENGTH, ANCHORS, WIDTH = 64, 40, 4, 32


def write(folder: Path) -> None:
    """The exported heads, their target and what to feed them."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from dspark_hf import DSparkConfig, DSparkHead
    from dspark_hf.checkpoints.export import export

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 6}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    config = Qwen3Config(**sizes, **attention, initializer_range=0.2, tie_word_embeddings=False)
    Qwen3ForCausalLM(config).save_pretrained(folder / "target")
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    for name, fields in HEADS.items():
        fields = {"block_size": 4, "num_hidden_layers": 2, "markov_rank": 8, "initializer_range": 0.2} | fields
        head = DSparkHead(DSparkConfig.from_target(target.config, **fields)).eval()
        if head.config.draft_vocab_size:
            head.d2t.copy_(torch.randperm(VOCAB)[:40].sort().values - torch.arange(40))
        export(head, "speculators", folder / name, target)
    inputs = {
        "input_ids": torch.randint(0, VOCAB, (1, LENGTH)),
        "features": torch.randn(1, LENGTH, len(head.config.target_layer_ids) * WIDTH),
    }
    save_file(inputs, folder / "inputs.safetensors")


def load(folder: Path) -> None:
    """What speculators makes of them; runs in its venv."""
    from speculators import SpeculatorModel

    inputs = load_file(folder / "inputs.safetensors")
    for name in HEADS:
        model = SpeculatorModel.from_pretrained(str(folder / name)).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            hidden, logits, _, _, places = model._backbone_forward(
                inputs["features"],
                inputs["input_ids"],
                torch.ones(1, LENGTH, dtype=torch.long),
                torch.randn(1, LENGTH, WIDTH),
                torch.zeros(1, LENGTH, dtype=torch.long),
                max_anchors=ANCHORS,
            )
            size = model.config.block_size
            found = {"anchors": places[::size], "hidden": hidden.view(ANCHORS, size, -1)}
            logits, previous = logits.view(ANCHORS, size, -1), inputs["input_ids"][0, places].view(ANCHORS, size)
            markov, judge = getattr(model, "markov_head", None), getattr(model, "confidence_head", None)
            if markov is not None:
                logits = logits + markov.block_bias(prev_token_ids=previous, hidden_states=found["hidden"])
            if judge is not None:
                seen = [found["hidden"]]
                if model.config.confidence_head_with_markov:
                    seen.append(markov.prev_embeddings(previous))
                found["confidence"] = judge(torch.cat(seen, dim=-1))
        found["logits"] = logits
        tensors = {f"tensor.{key}": value for key, value in model.state_dict().items() if "verifier" not in key}
        found = {key: value.detach().clone().contiguous() for key, value in (found | tensors).items()}
        save_file(found, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps([type(model).__name__, model.config.to_dict()], default=str))


@torch.no_grad()
def compare(folder: Path) -> None:
    """Raise `AssertionError` where the two sides differ."""
    from transformers import AutoModelForCausalLM

    from dspark_hf import DSparkHead
    from dspark_hf.training.blocks import Blocks, attention_masks

    inputs = load_file(folder / "inputs.safetensors")
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    for name in HEADS:
        found = load_file(folder / f"{name}.safetensors")
        kind, config = json.loads((folder / f"{name}.json").read_text())
        written = json.loads((folder / name / "config.json").read_text())
        for key in written.keys() - {"transformers_version", "transformer_layer_config", "architectures", "dtype"}:
            assert config.get(key) == written[key], (name, key, config.get(key), written[key])
        for key, value in written["transformer_layer_config"].items():
            assert config["transformer_layer_config"].get(key, value) == value, (name, key)
        for key, value in load_file(folder / name / "model.safetensors").items():
            assert torch.equal(found[f"tensor.{key}"], value), (name, key)
        head = DSparkHead.from_pretrained(folder / name).eval()
        embeddings, anchors = head.share_embeddings(target), found["anchors"][None]
        said = f"{name}: {kind} loads, {len(written)} keys and all tensors agree"
        masks = attention_masks(Blocks(anchors, anchors > -1), LENGTH, head.mask_rules, head.config.block_size)
        hidden, logits, confidence = head(inputs["input_ids"], inputs["features"], anchors, masks, embeddings)
        predict = slice(-head.config.gamma, None)
        torch.testing.assert_close(hidden[0], found["hidden"][:, predict], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[0], found["logits"][:, predict], atol=1e-4, rtol=1e-4)
        if confidence is not None:
            torch.testing.assert_close(confidence[0], found["confidence"], atol=1e-4, rtol=1e-4)
        print(
            f"{said}, so do hidden states, logits{'' if confidence is None else ' and confidence'} of {ANCHORS} blocks"
        )


def main(venv: Path) -> None:
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        # Of this project nothing is there.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([python, __file__, "--load", folder], check=True, env=environment)
        compare(Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(tempfile.gettempdir(), "speculators-venv")))
