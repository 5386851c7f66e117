"""The licences that a card on the Hub may name."""

import difflib
import re
from dataclasses import dataclass

# From the Hub's page on licences, huggingface.co/docs/hub/repositories-licenses, as of November 2026. The Hub refuses
# cards with others; huggingface_hub does not know them.
LISTED = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
unknown unlicense wtfpl zlib
"""
IDENTIFIERS = frozenset(LISTED.split())
# What the Hub takes as the name of another licence, and as a link to a file of the repository.
NAME, FILES = r"[a-z0-9.-]+", ("LICENSE", "LICENSE.md")


@dataclass(frozen=True)
class License:
    """A licence as a card names it.

    identifier: one of `IDENTIFIERS`. name, link: of a licence that is `other`; the link is an address, or one of
    `FILES` in the repository.

    Raises:
        ValueError: for what the Hub refuses.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self):
        if self.identifier not in IDENTIFIERS:
            close = difflib.get_close_matches(self.identifier.lower(), IDENTIFIERS)
            meant = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(
                f"The Hub knows no licence {self.identifier!r}.{meant} For one that is not on its list give --license "
                "other with --license-name and --license-link."
            )
        if self.identifier != "other":
            if self.name is not None or self.link is not None:
                raise ValueError(f"--license-name and --license-link are for --license other, not {self.identifier}.")
            return
        if self.name is None or self.link is None:
            raise ValueError("--license other needs --license-name and --license-link.")
        if not re.fullmatch(NAME, self.name):
            raise ValueError(
                f"--license-name {self.name!r}: the Hub takes lower-case letters, digits, dots and hyphens."
            )
        if self.link not in FILES and not re.match(r"https?://\S+$", self.link):
            raise ValueError(
                f"--license-link {self.link!r}: expected an address, https://.., or {' or '.join(FILES)}, a file in "
                "the folder of the head."
            )


def as_license(given: str | License | None) -> License | None:
    """A licence from its identifier, or as it is.

    Raises:
        ValueError: for what the Hub refuses.
    """
    return License(given) if isinstance(given, str) else given
