"""The one error about files that are no sound head."""

from typing import Any


class CheckpointError(ValueError):
    """A head's files contradict themselves, their layout or each other. Nothing has been loaded.

    Args:
        file: path of the file, or its name in a repository. key: of the config, or name of the tensor.
        found, expected: what the file says and what it should say. fix: what to do about it.
    """

    def __init__(self, file: str, key: str, found: Any, expected: str, fix: str = ""):
        self.file, self.key, self.found, self.expected = file, key, found, expected
        super().__init__(f"{file}: {key}: found {found}, expected {expected}.{' ' * bool(fix)}{fix}")


def config_file(source: str) -> str:
    """How errors call the config of a folder or repository."""
    return f"{source.rstrip('/')}/config.json"
