"""The `dspark-hf` command, one module a subcommand."""

import sys

from . import (  # noqa: F401
    bench,
    calibrate,
    demo,
    doctor,
    eval,
    export,
    generate,
    heads,
    inspect,
    profile,
    publish,
    regenerate,
    serve,
    train,
    verify,
)
from .common import app, errors
from .extras import extra_with


def main() -> None:
    """Run the command; errors that its user can put right are shown without a stack trace."""
    try:
        app()
    except ImportError as error:
        command, package = sys.argv[1], (error.name or "").partition(".")[0]
        extra = extra_with(package, command)
        if extra is not None:
            _fail(f"`dspark-hf {command}` needs {package}, which is not installed: pip install 'dspark-hf[{extra}]'")
        if package:
            # Not what a user lacks, but a broken installation or a fault of ours.
            raise
        # Of transformers, for a model that needs another package; the message says which.
        _fail(str(error))
    except (ValueError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    errors.print(f"error: {message}", soft_wrap=True)
    sys.exit(1)
