"""Pictures: matplotlib, loaded when one is drawn."""


def import_pyplot():
    """matplotlib's pyplot, without a display.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("Pictures need matplotlib: pip install 'dspark-hf[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
