"""Several processes that run one model, or whose models wait for each other."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

Value = TypeVar("Value")


class Ranks:
    """The processes that share a tensor-parallel model. Each makes its part of every pass, so all must make the same
    passes: what depends on a clock the first of them decides.

    Attributes:
        leads: whether this process is that one; also where there is only one.
    """

    def __init__(self, model: PreTrainedModel):
        self.group, self.leads = None, True
        mesh = getattr(model, "_device_mesh", None)
        if mesh is not None and (model.tp_size or 1) > 1:
            self.group = mesh.get_group("tp" if "tp" in (mesh.mesh_dim_names or ()) else None)
            self.leads = dist.get_rank(self.group) == 0

    def agreed(self, decide: Callable[[], Value]) -> Value:
        """What `decide` gives in the leading process, in all of them."""
        if self.group is None:
            return decide()
        box = [decide() if self.leads else None]
        dist.broadcast_object_list(box, dist.get_global_rank(self.group, 0), self.group)
        return box[0]


def any_busy(busy: bool, device: torch.device) -> bool:
    """Whether any process is, where all wait for each other in every pass (`synced_gpus`)."""
    flag = torch.tensor(float(busy), device=device)
    dist.all_reduce(flag)
    return bool(flag)
