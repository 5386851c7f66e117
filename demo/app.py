"""The demo as a Hugging Face Space: `python app.py`. The code is `dspark_hf.demo`; `dspark-hf demo` starts the same."""

import contextlib

# On ZeroGPU Spaces this package has to come before torch.
with contextlib.suppress(ImportError):
    import spaces  # noqa: F401

from dspark_hf.demo.app import build, launch

demo = build()

if __name__ == "__main__":
    launch(demo)
