"""What the pictures share."""

from pathlib import Path

import numpy as np

from .calibration import bins


def import_pyplot():
    """matplotlib's pyplot, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_picture(path: Path) -> None:
    """Raise unless a picture can be written to the path: to be called before what it shows is measured.

    Raises:
        ModuleNotFoundError: without matplotlib. ValueError: for a suffix that it does not know.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{str(path)!r} names no picture: expected one of .{', .'.join(sorted(known))}.")


def save(figure, path: Path) -> None:
    """Write a figure of pyplot, and forget it."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    import_pyplot().close(figure)


def draw_reliability(panel, position: int, predicted: np.ndarray, survived: np.ndarray, **style) -> None:
    """Into one panel for a position (0 for the first): how often drafts survived against the survival that they were
    given, both [N]."""
    counts, promised, observed = bins(predicted, survived)
    filled = counts > 0
    panel.plot([0, 1], [0, 1], color="black", linewidth=0.5)
    panel.plot(promised[filled] / counts[filled], observed[filled] / counts[filled], marker=".", **style)
    panel.set_title(f"position {position + 1}", fontsize="small")
