"""How heads are loaded, saved and published: the methods of `DSparkHead` and its config that need files or the Hub.

The classes know neither, so that imports point one way; `add_methods` puts these onto them from above.
"""

import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .checkpoints import read_config, write_config
from .checkpoints.files import (
    GENERATION_CONFIG,
    HUB_ARGUMENTS,
    Checkpoint,
    brings_head,
    open_checkpoint,
    read_draft_settings,
)
from .configuration_dspark import DSparkConfig
from .hub.registry import head_for
from .modeling_dspark import DSparkHead, default_settings
from .scheduling.settings import HEAD_SETTINGS

# -- Methods of a head -------------------------------------------------------------------------------------------------


def from_pretrained(
    cls: type[DSparkHead], pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
) -> DSparkHead:
    """Load a head from a Hub id or a folder; arguments as in `PreTrainedModel.from_pretrained`. Those of a target do
    where its checkpoint holds the head (DeepSeek V4), or its folder `dspark` does.

    Raises:
        CheckpointError: a `ValueError`, for an unknown layout, a config that contradicts itself, a damaged file, a
            pickle, or tensors that are missing, left over or of another shape than the config says. Nothing has
            been loaded then. Code that comes with a head is never run.
        OSError: transformers' own, when the repository or its weights cannot be found.
    """
    settings, source = {}, pretrained_model_name_or_path
    if source is not None:
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        checkpoint = open_checkpoint(source, **hub)
        checkpoint.validate(cls)
        checkpoint.validate_maps()
        if checkpoint.subfolder:
            hub["subfolder"] = kwargs["subfolder"] = checkpoint.subfolder
        settings = read_draft_settings(checkpoint.source, **hub)
        if kwargs.get("config") is None:
            kwargs = checkpoint.from_tensors | kwargs
        if checkpoint.weights is None:
            kwargs = {"key_mapping": checkpoint.key_mapping} | kwargs | {"use_safetensors": True}
        else:
            source, kwargs = None, _from_weights(cls, checkpoint, kwargs)
    loaded = super(DSparkHead, cls).from_pretrained(source, *model_args, **kwargs)  # type: ignore[misc]
    head = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
    if source is None and pretrained_model_name_or_path is not None:
        head.config._name_or_path = checkpoint.source
    head.generation_config.update(**settings)
    return loaded


def _from_weights(cls: type[DSparkHead], checkpoint: Checkpoint, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `from_pretrained` without a path: the head's own tensors alone are read, one after the other."""
    config = kwargs.pop("config", None)
    # Of weights, where a config takes it for a key of its own.
    dtype = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
    if config is None:
        load = cls.config_class.from_pretrained
        config, kwargs = load(checkpoint.source, return_unused_kwargs=True, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
    return kwargs | dtype | {"config": config, "state_dict": checkpoint.weights}


def head_of(target: str, **hub: Any) -> str:
    """The folder or Hub id to load the head for a target from: its own where it brings one, inside its checkpoint or in
    its folder `dspark`; else that of the registry.

    Raises:
        ValueError: when no head is known for the target.
    """
    return target if target and brings_head(target, **hub) else head_for(target).head


def for_target(cls: type[DSparkHead], target: PreTrainedModel | str | os.PathLike, **kwargs: Any) -> DSparkHead:
    """Load the head that a target brings, or the published one for it; see [`head_of`].

    Args:
        target: the model, or its Hub id. A model also gives the head its dtype and device.
        kwargs: of [`~DSparkHead.from_pretrained`].

    Raises:
        ValueError: when no head is known for the target.
    """
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    if not isinstance(target, PreTrainedModel):
        return cls.from_pretrained(head_of(os.fspath(target), **hub), **kwargs)
    head = cls.from_pretrained(head_of(target.config._name_or_path, **hub), **{"dtype": target.dtype} | kwargs)
    # Not by `device_map`, which needs accelerate.
    return head if "device_map" in kwargs else head.to(target.device)


def save_pretrained(self: DSparkHead, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """Write the head in DeepSpec's layout, which other engines load, or in our own where DeepSpec's cannot express
    it (see `checkpoints`); arguments as in transformers. [`~checkpoints.export.export`] writes other layouts.

    Settings of drafting that are not those of a fresh head go to generation_config.json."""
    kwargs = {"state_dict": self.full_state_dict(), "save_original_format": False} | kwargs
    super(DSparkHead, self).save_pretrained(save_directory, **kwargs)
    settings, fresh = self.generation_config, default_settings(self.config)
    if any(getattr(settings, key, None) != getattr(fresh, key) for key in HEAD_SETTINGS):
        settings.save_pretrained(save_directory)
    else:
        Path(save_directory, GENERATION_CONFIG).unlink(missing_ok=True)


def push_to_hub(
    self: DSparkHead,
    repo_id: str,
    target: str | None = None,
    results: str | os.PathLike | None = None,
    license: str | None = None,
    private: bool = False,
    commit_message: str = "Upload a draft head with dspark-hf",
) -> str:
    """Publish the head as `dspark-hf publish` does, with a card and `custom_generate`; see
    [`~hub.publishing.publish`].

    The token is that of huggingface_hub's login.

    Args:
        target: Hub id of the target; not needed with `results`, what `dspark-hf eval` wrote.

    Returns:
        the address of the commit.
    """
    from .hub.publishing import publish_head

    options = {"target": target, "results": results, "license": license, "private": private}
    return publish_head(self, repo_id, **options, message=commit_message)


# -- Methods of a config -----------------------------------------------------------------------------------------------


def get_config_dict(
    cls: type[DSparkConfig], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As in transformers, with the published layout of the checkpoint translated to the keys of `DSparkConfig`."""
    config, kwargs = super(DSparkConfig, cls).get_config_dict(  # type: ignore[misc]
        pretrained_model_name_or_path, **kwargs
    )
    return read_config(config, str(pretrained_model_name_or_path)), kwargs


def to_json_string(self: DSparkConfig, use_diff: bool = True) -> str:
    """The config that `save_pretrained` writes: DeepSpec's, which other engines read, where it can express this
    head, and otherwise one of our own keys."""
    return json.dumps(write_config(self.own_keys()), indent=2, sort_keys=True) + "\n"


def add_methods() -> None:
    """Give the functions of this file to the two classes as methods; `import dspark_hf` does so."""
    DSparkHead.from_pretrained = classmethod(from_pretrained)
    DSparkHead.for_target = classmethod(for_target)
    DSparkHead.save_pretrained = save_pretrained
    DSparkHead.push_to_hub = push_to_hub
    DSparkConfig.get_config_dict = classmethod(get_config_dict)
    DSparkConfig.to_json_string = to_json_string
