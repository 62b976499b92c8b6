# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module checks the license and the languages of a card, without the network.

The Hub adds licenses in time, so an unknown identifier gets a warning only; the Hub itself refuses what it does not know. The identifiers are those of https://huggingface.co/docs/hub/repositories-licenses.
"""

import difflib
import re
from collections.abc import Sequence

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging

from ..utils.errors import UserError


logger = logging.get_logger(__name__)

# fmt: off
LICENSES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "grok2-community",
    "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by",
    "ofl-1.1", "open-mdw", "openmdw-1.0", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql",
    "unknown", "unlicense", "wtfpl", "zlib",
))
# fmt: on
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# ISO 639 codes of two or three letters, with a script or region, and the Hub's two words for other cases
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")


def check_license(license: object, recorded: object = None) -> None:
    """Refuses a license that has not the form of the Hub's identifiers, and warns of one that is not in the list here.

    Args:
        license: identifier for the card; None passes.
        recorded: identifier from the card of the base model. The Hub accepted it there, even if it is newer than the list.

    Raises:
        UserError: names an identifier that resembles the license.
    """
    if license is None or license in LICENSES:
        return
    close = difflib.get_close_matches(str(license).lower(), LICENSES, n=1)
    if not isinstance(license, str) or not IDENTIFIER.fullmatch(license):
        hint = f"did you mean {close[0]}?" if close else "write one such as apache-2.0, or other"
        raise UserError(f"license {license!r:.100} is no identifier of the Hub: {hint}")
    if license != recorded:
        hint = f": did you mean {close[0]}?" if close else "."
        logger.warning(f"license {license!r} is not in this version's list of the Hub's identifiers{hint}")


def check_languages(language: str | Sequence[str] | None) -> None:
    """Refuses a language that is no code of ISO 639, nor `code` or `multilingual`.

    Raises:
        UserError: names the language.
    """
    for code in [language] if isinstance(language, str) else language or []:
        if not LANGUAGE.fullmatch(code):
            raise UserError(f"language {code!r:.100} is no code of a language: write one such as en, de or zh")


def is_hub_name(name: str) -> bool:
    """Returns whether a text has the form `owner/name` of a model or data set on the Hub."""
    if name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
