"""Word forms: articles, plurals, tenses and pronouns, by rule with the exceptions spelled out.

A word list is whitespace-separated, `_` standing for a space: `otter mouse:mice` for nouns, `walk run:ran:running`
for verbs (base, past, -ing form), `brave` for adjectives, `Tom` after the line `he` for names. A list of kind
`phrase` has one phrase per line; one of kind `fact` has lines such as `tide | the slow rise and fall of the sea`,
whose second column is the form `is`.
"""

from __future__ import annotations

import re
from typing import Any

# Spelled with a vowel but spoken with a consonant, and the other way round.
_CONSONANT = ("uni", "use", "usu", "one", "once", "eu", "ute")
_VOWEL = ("hour", "honest", "heir", "honor")
_PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself", "kid": "boy", "grown": "man"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself", "kid": "girl", "grown": "woman"},
}


def with_article(word: str) -> str:
    """`an otter`, `a unicorn`, `an hour`."""
    low = word.lower()
    vowel = low.startswith(_VOWEL) or (low[0] in "aeiou" and not low.startswith(_CONSONANT))
    return ("an " if vowel or low.startswith("unin") else "a ") + word


def plural(noun: str) -> str:
    """The regular plural of a noun: of its last word, but `cups of cocoa`."""
    head, of, tail = noun.partition(" of ")
    if of:
        return plural(head) + of + tail
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


def third_person(verb: str) -> str:
    """`he carries`; of the first word of a phrase such as `look after`."""
    head, space, tail = verb.partition(" ")
    return {"have": "has", "go": "goes", "do": "does"}.get(head, plural(head)) + space + tail


def past(verb: str) -> str:
    """`carried`, of the first word of a phrase; doubled consonants are left to the lists."""
    head, space, tail = verb.partition(" ")
    if re.search(r"[^aeiou]y$", head):
        head = head[:-1] + "ied"
    else:
        head += "d" if head.endswith("e") else "ed"
    return head + space + tail


def gerund(verb: str) -> str:
    """`carrying`, of the first word of a phrase; doubled consonants are left to the lists."""
    head, space, tail = verb.partition(" ")
    if head.endswith("e") and not head.endswith("ee"):
        head = head[:-1]
    return head + "ing" + space + tail


def entries(kind: str, lines: list[str]) -> list[dict[str, Any]]:
    """The forms of each word of a list of this kind.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind == "phrase":
        return [_capitals({"": line}) for line in lines]
    if kind == "fact":
        return [_fact(*(column.strip() for column in line.split("|"))) for line in lines]
    words = [token.replace("_", " ").split(":") for line in lines for token in line.split()]
    if kind == "name":
        return list(_names(words))
    makers = {"noun": _noun, "verb": _verb, "adjective": _adjective}
    if kind not in makers:
        known = ", ".join([*makers, "name", "phrase", "fact"])
        raise ValueError(f"{kind!r} is not a kind of word list; known: {known}")
    return [makers[kind](*word) for word in words]


def _noun(word: str, many: str = "") -> dict[str, Any]:
    return _capitals({"": word, "a": with_article(word), "s": many or plural(word)})


def _fact(word: str, meaning: str, *more: str) -> dict[str, Any]:
    extra = {f"is{i}": text for i, text in enumerate(more, 2)}
    return _capitals({"": word, "is": meaning, **extra})


def _adjective(word: str) -> dict[str, Any]:
    return _capitals({"": word, "a": with_article(word)})


def _verb(word: str, before: str = "", ing: str = "") -> dict[str, Any]:
    tail = word.partition(" ")[2]

    def whole(form: str) -> str:
        return f"{form} {tail}" if tail and " " not in form else form

    forms = {"d": whole(before) if before else past(word), "ing": whole(ing) if ing else gerund(word)}
    return _capitals({"": word, "s": third_person(word), **forms})


def _names(words: list[list[str]]) -> Any:
    pronouns: dict[str, str] = {}
    for (word,) in words:
        if word in _PRONOUNS:
            pronouns = _PRONOUNS[word]
        else:
            yield _capitals({"": word, **pronouns})


def _capitals(forms: dict[str, Any]) -> dict[str, Any]:
    # "His" is "his" with a capital; the plain form's capital is "C".
    big = {(key[0].upper() + key[1:]) if key else "C": text[0].upper() + text[1:] for key, text in forms.items()}
    return {**forms, **big}
