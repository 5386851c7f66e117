"""Published layouts ("dialects") of draft heads: recognise, read, write. The rest of the project knows one config."""

from typing import Any

from . import deepspec

DIALECTS = (deepspec,)
NATIVE_MODEL_TYPE = "dspark"


def read_config(published: dict[str, Any], source: str) -> dict[str, Any]:
    """The keys of a [`DSparkConfig`] from a published `config.json`.

    Raises:
        OSError: when there is no config at all.
        ValueError: when no dialect recognises the layout, naming what was found.
    """
    if not published:
        raise OSError(f"There is no config.json in {source!r}. Check the path or the repository id.")
    if published.get("model_type") == NATIVE_MODEL_TYPE:
        return published
    for dialect in DIALECTS:
        if dialect.recognises(published):
            return dialect.read_config(published, source)
    raise ValueError(
        f"{source!r} is not a draft head that dspark_hf can read: its config.json has "
        f"architectures={published.get('architectures')} and model_type={published.get('model_type')!r}. "
        f"Known layouts: {', '.join(dialect.DESCRIPTION for dialect in DIALECTS)}. If this is a whole language model, "
        "load it with AutoModelForCausalLM and pass a head trained for it as `assistant_model`."
    )
