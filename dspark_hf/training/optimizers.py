"""How a head is optimised: AdamW or Muon, warmup and a cosine; with less memory at the price of time."""

import math

import torch

from ..modeling_dspark import DSparkHead


def build_optimizers(head: DSparkHead, name: str, learning_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the backbone's matrices and AdamW for the rest.

    Raises:
        ValueError: for another name.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    if name == "adamw":
        return [torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)]
    if name != "muon":
        raise ValueError(f"The optimizer must be adamw or muon, got {name!r}.")
    matrices = [head.fc.weight, *(p for p in head.layers.parameters() if p.ndim == 2)]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def warmup_then_cosine(step: int, steps: int, warmup_share: float) -> float:
    """What the learning rate is multiplied by after so many steps of a run."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def checkpoint_layers(head: DSparkHead, enable: bool = True) -> None:
    """Gradient checkpointing of the draft layers: their activations are computed again in the backward pass."""
    # Before transformers 5.24 it had the older name only, which warns since.
    name = next(
        name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(head, f"{name}_enable")
    )
    if enable:
        getattr(head, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(head, f"{name}_disable")()
