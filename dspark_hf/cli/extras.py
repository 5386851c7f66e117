"""Which extra of the project brings a package."""

from importlib.metadata import metadata, requires

from packaging.requirements import Requirement

# For those who work on the project.
NOT_FOR_USERS = "test"


def extra_with(package: str, command: str) -> str | None:
    """The extra to install for a package that is missing: the one called like the command, or else the first that
    pyproject.toml lists with it; `None` where no extra has it."""
    named = [one for one in map(Requirement, requires("dspark-hf")) if one.name == package and one.marker is not None]
    extras = [
        extra
        for extra in metadata("dspark-hf").get_all("Provides-Extra")
        if extra != NOT_FOR_USERS and any(one.marker.evaluate({"extra": extra}) for one in named)
    ]
    return command if command in extras else next(iter(extras), None)
