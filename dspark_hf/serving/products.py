"""What torch keeps of the shapes of matrix products on a CPU."""

import os

# Products whose code is kept; a round runs a dozen or two, and comes back to the shapes of those before it.
KEPT_PRODUCTS = 128
# Of oneDNN and of torch's layer around it, each 1024 by default.
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_few() -> None:
    """Let torch keep the code of few products; has to be called before the first. What the environment says stands.

    In bfloat16 oneDNN compiles code for every shape, of half a MiB, and rounds bring new ones for hours, as they hold
    as many tokens as their rows verify and their prompts have. By default so many are kept that a server grows by half
    a GiB.
    """
    for name in CAPACITIES:
        os.environ.setdefault(name, str(KEPT_PRODUCTS))
