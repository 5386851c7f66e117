"""The `dspark-hf` command, one module a subcommand."""

import sys

from . import (  # noqa: F401
    bench,
    calibrate,
    demo,
    eval,
    export,
    generate,
    heads,
    inspect,
    profile,
    publish,
    train,
    verify,
)
from .common import app, errors


def main() -> None:
    """Run the command; errors that users can mend are shown without a stack trace."""
    try:
        app()
    except (ValueError, OSError) as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
