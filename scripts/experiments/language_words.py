# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads words of 38 languages in Latin script from the dictionaries of Debian's packages hunspell and myspell.

A domain of words has what an experiment on domains needs: the domains share an alphabet, some are relatives, and a few letters
do not tell them apart.
"""

import functools
from pathlib import Path

import numpy as np

from modeling_moe.utils.errors import UserError


FOLDER = Path("/usr/share/hunspell")
# number of words of each language, of which the last quarter is held out
WORDS = 4000
HELD_OUT_SHARE = 0.25
# language -> file of the dictionary, and Debian's package
LANGUAGES = {
    "Afrikaans": ("af_ZA", "hunspell-af"),
    "Aragonese": ("an_ES", "hunspell-an"),
    "Basque": ("eu", "hunspell-eu"),
    "Bosnian": ("bs_BA", "hunspell-bs"),
    "Breton": ("br_FR", "hunspell-br"),
    "Catalan": ("ca", "hunspell-ca"),
    "Croatian": ("hr_HR", "hunspell-hr"),
    "Czech": ("cs_CZ", "hunspell-cs"),
    "Danish": ("da_DK", "hunspell-da"),
    "Dutch": ("nl", "hunspell-nl"),
    "English": ("en_US", "hunspell-en-us"),
    "Esperanto": ("eo", "myspell-eo"),
    "Estonian": ("et_EE", "myspell-et"),
    "Faroese": ("fo_FO", "myspell-fo"),
    "French": ("fr", "hunspell-fr-classical"),
    "Gaelic": ("gd_GB", "hunspell-gd"),
    "Galician": ("gl_ES", "hunspell-gl-es"),
    "German": ("de_DE", "hunspell-de-de"),
    "Guarani": ("gug_PY", "hunspell-gug"),
    "Hungarian": ("hu_HU", "hunspell-hu"),
    "Icelandic": ("is_IS", "hunspell-is"),
    "Indonesian": ("id_ID", "hunspell-id"),
    "Italian": ("it_IT", "hunspell-it"),
    "Kurmanji": ("kmr_Latn", "hunspell-kmr"),
    "Latvian": ("lv_LV", "hunspell-lv"),
    "Lithuanian": ("lt_LT", "hunspell-lt"),
    "Norwegian": ("nb_NO", "hunspell-no"),
    "Occitan": ("oc_FR", "hunspell-oc"),
    "Polish": ("pl_PL", "hunspell-pl"),
    "Portuguese": ("pt_PT", "hunspell-pt-pt"),
    "Romanian": ("ro_RO", "hunspell-ro"),
    "Serbian": ("sr_Latn_RS", "hunspell-sr"),
    "Slovak": ("sk_SK", "hunspell-sk"),
    "Slovenian": ("sl_SI", "hunspell-sl"),
    "Spanish": ("es_ES", "hunspell-es"),
    "Swahili": ("sw_TZ", "hunspell-sw"),
    "Swedish": ("sv_SE", "hunspell-sv"),
    "Tagalog": ("tl", "myspell-tl"),
    "Turkish": ("tr_TR", "hunspell-tr"),
    "Vietnamese": ("vi_VN", "hunspell-vi"),
}


def refuse_missing_languages() -> None:
    """Raises a UserError that names Debian's packages of the dictionaries that are missing."""
    missing = sorted({package for file, package in LANGUAGES.values() if not (FOLDER / f"{file}.dic").is_file()})
    if missing:
        raise UserError(f"{FOLDER} lacks dictionaries: apt-get install {' '.join(missing)}")


def _words(file: str) -> list[str]:
    """Returns the words of a dictionary in lower case, without names, abbreviations and compounds by a hyphen."""
    rules = (FOLDER / f"{file}.aff").read_bytes().splitlines()
    encoding = next(line.split()[1].decode() for line in rules if line.startswith(b"SET"))
    lines = (FOLDER / f"{file}.dic").read_bytes().decode(encoding, errors="replace").splitlines()[1:]
    words = {line.split("/")[0].split("\t")[0].split(" ")[0] for line in lines}
    return sorted(word for word in words if len(word) > 1 and word.isalpha() and word.islower())


@functools.cache
def language_bytes(language: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns random words of a language (n,) uint8 in UTF-8, and others that are held out; a space follows each word."""
    words = _words(LANGUAGES[language][0])
    chosen = np.random.default_rng(0).permutation(len(words))[:WORDS]
    border = round(len(chosen) * (1 - HELD_OUT_SHARE))
    parts = (" ".join([*(words[i] for i in part), ""]) for part in (chosen[:border], chosen[border:]))
    first, second = (np.frombuffer(part.encode(), dtype=np.uint8) for part in parts)
    return first, second
