"""The grammar of `tales`: sentences with slots, and choices that know their probability.

A grammar is read from plain text files. `@name kind` opens a list: of words where the kind is `noun`, `verb`,
`adjective`, `name`, `phrase` or `fact`, of alternatives (one per line, `3*` in front of one sets its weight) where
no kind is given. In an alternative
    {name}        another list is drawn from and written; a bound word is repeated
    {x=name}      ... and the word is bound to x for the rest of the document
    {name.form}   another form of the word: `a` with its article, `s` plural or third person, `d` past, `ing`,
                  `he his him kid` of a name; a capital first letter of the form writes a capital
    {x/part}      a draw from the list `part` that belongs to the bound word x (its topic's own words)
    [one|two]     a choice on the spot; an alternative may hold slots, and may be empty
    ¶             a new paragraph

All choices but weighted ones are uniform, and no list gives the same item twice in a document until it is used up; the
probability of a draw is 1 / (items left), so the score of a derivation is exact. That each text has only one derivation
is checked by the tests, which parse texts by trying every alternative of every choice.

A word list is whitespace-separated, `_` standing for a space: `otter mouse:mice` for nouns, `walk run:ran:running`
for verbs (base, past, -ing form), `brave` for adjectives, `Tom` after the line `he` for names. A list of kind
`phrase` has one phrase per line; one of kind `fact` has lines such as `tide | the slow rise and fall of the sea`,
whose second column is the form `is`. Regular forms are made by rule; a list spells its exceptions out.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Entry = dict[str, Any]
"""The forms of a word by name, and under `/part` the lists that belong to it."""

SAY, DRAW, OWN, SUB, ALT = range(5)
_LOG2 = [0.0] + [math.log2(n) for n in range(1, 4096)]
_PARTS = re.compile(r"\{([^{}]*)\}|\[|\]|\|")
_SLOT = re.compile(r"(?:(\w+)=)?([\w-]+)(?:/(\w+))?(?:\.(\w+))?")


class GrammarError(ValueError):
    """A mistake in a grammar file: the list, the line and what is wrong."""


@dataclass(eq=False, slots=True)
class Words:
    """A list of words that is drawn from without replacement."""

    entries: list[Entry]
    size: int


@dataclass(eq=False, slots=True)
class Rule:
    """Alternatives, each a compiled sequence of literal strings and slots."""

    name: str
    alternatives: list[tuple] = field(default_factory=list)
    weights: list[int] | None = None
    bounds: list[int] = field(default_factory=list)
    size: int = 0


@dataclass(eq=False, slots=True)
class Draft:
    """A document being written: its words so far, its bound words, what each list has given, its bits."""

    random: Callable[[], float]
    out: list[str] = field(default_factory=list)
    bound: dict[str, Entry] = field(default_factory=dict)
    taken: dict[Words | Rule, list[int]] = field(default_factory=dict)
    bits: float = 0.0

    def pick(self, source: Words | Rule) -> int:
        """An index into `source`, uniform over what it has not given yet in this document."""
        size = source.size
        taken = self.taken.setdefault(source, [])
        if len(taken) >= size:
            taken.clear()
        index = int(self.random() * size)
        while index in taken:
            index = int(self.random() * size)
        self.bits += _LOG2[size - len(taken)]
        taken.append(index)
        return index

    def write(self, parts: tuple) -> None:
        """Append the text of a sequence, drawing whatever its slots ask for."""
        out, bound = self.out, self.bound
        for part in parts:
            if part.__class__ is str:
                out.append(part)
                continue
            kind = part[0]
            if kind == SAY:
                out.append(bound[part[1]][part[2]])
            elif kind == SUB:
                rule = part[1]
                if rule.weights is None:
                    self.write(rule.alternatives[self.pick(rule)])
                else:
                    index = bisect.bisect_right(rule.bounds, self.random() * rule.bounds[-1])
                    self.bits -= math.log2(rule.weights[index] / rule.bounds[-1])
                    self.write(rule.alternatives[index])
            elif kind == ALT:
                choices = part[1]
                self.bits += _LOG2[len(choices)]
                self.write(choices[int(self.random() * len(choices))])
            else:
                _, source, variable, form = part
                if kind == OWN:
                    source = bound[source[0]][source[1]]
                entry = source.entries[self.pick(source)]
                if variable:
                    bound[variable] = entry
                out.append(entry[form])


class Grammar:
    """All lists of one or several files, compiled.

    Raises:
        GrammarError: a line cannot be read, a list is defined twice or holds a duplicate, a slot names nothing.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.words: dict[str, Words] = {}
        self.rules: dict[str, Rule] = {}
        lines: dict[str, list[str]] = {}
        kinds: dict[str, str] = {}
        for text in texts:
            name = ""
            for line in map(str.strip, text.splitlines()):
                if line.startswith("@"):
                    name, _, kind = line[1:].partition(" ")
                    if name in lines:
                        raise GrammarError(f"@{name} is defined twice")
                    lines[name], kinds[name] = [], kind.strip()
                elif line and not line.startswith("#"):
                    lines[name].append(line)
        for name, kind in kinds.items():
            if kind:
                words = entries(kind, lines[name])
                self.words[name] = Words(words, len(words))
                self._distinct(name, [entry[""] for entry in words])
            else:
                self.rules[name] = Rule(name)
        for name in self.words:
            owner, slash, part = name.rpartition("/")
            if slash:
                self._own(owner, part, self.words[name])
        for name, rule in self.rules.items():
            self._compile(rule, lines[name])

    def _own(self, owner: str, part: str, words: Words) -> None:
        # "@farming/worker" belongs to every entry spelled "farming" in any list.
        found = [e for w in self.words.values() for e in w.entries if e[""].replace(" ", "_") == owner]
        if not found:
            raise GrammarError(f"@{owner}/{part}: no list holds the word {owner!r}")
        for entry in found:
            entry["/" + part] = words

    def _compile(self, rule: Rule, lines: list[str]) -> None:
        if not lines:
            raise GrammarError(f"@{rule.name} is empty")
        weights = []
        for line in lines:
            weight = re.match(r"(\d+)\*\s*", line)
            weights.append(int(weight[1]) if weight else 1)
            text = re.sub(r"\s*¶\s*", "\n\n", line[weight.end() :] if weight else line)
            rule.alternatives.append(self._parse(rule.name, text))
        self._distinct(rule.name, rule.alternatives)
        rule.size = len(lines)
        if set(weights) != {1}:
            rule.weights, rule.bounds = weights, list(itertools.accumulate(weights))

    def _parse(self, name: str, text: str) -> tuple:
        # A stack of open choices, each a list of sequences; the bottom holds the line itself.
        stack: list[list[list]] = [[[]]]
        position = 0
        for match in _PARTS.finditer(text):
            if match.start() > position:
                stack[-1][-1].append(text[position : match.start()])
            position = match.end()
            token = match[0]
            if token == "[":
                stack.append([[]])
            elif token == "|":
                stack[-1].append([])
            elif token == "]":
                choices = tuple(tuple(sequence) for sequence in stack.pop())
                self._distinct(name, choices)
                stack[-1][-1].append((ALT, choices))
            else:
                stack[-1][-1].append(self._slot(name, match[1]))
        if position < len(text):
            stack[-1][-1].append(text[position:])
        if len(stack) != 1 or len(stack[0]) != 1:
            raise GrammarError(f"@{name}: unbalanced brackets in {text!r}")
        return tuple(stack[0][0])

    def _slot(self, name: str, text: str) -> tuple:
        if text in self.rules:
            return (SUB, self.rules[text])
        match = _SLOT.fullmatch(text)
        if not match:
            raise GrammarError(f"@{name}: cannot read the slot {{{text}}}")
        variable, source, part, form = match[1], match[2], match[3], match[4] or ""
        if variable in self.words or variable in self.rules:
            raise GrammarError(f"@{name}: {{{text}}} binds {variable!r}, which is the name of a list")
        if part:
            return (OWN, (source, "/" + part), variable, form)
        if source in self.words:
            for entry in self.words[source].entries:
                if form not in entry:
                    raise GrammarError(f"@{name}: {entry['']!r} of @{source} has no form {form!r}")
            return (DRAW, self.words[source], variable, form)
        if variable:
            raise GrammarError(f"@{name}: {{{text}}} draws from {source!r}, which is not a list")
        return (SAY, source, form)

    @staticmethod
    def _distinct(name: str, items: Iterable[Any]) -> None:
        seen = set()
        for item in items:
            if item in seen:
                raise GrammarError(f"@{name} holds {item!r} twice")
            seen.add(item)

    def write(self, start: str, random: Callable[[], float]) -> Draft:
        """A document of the rule `start`; `random` gives uniform numbers in [0, 1)."""
        draft = Draft(random)
        draft.write(((SUB, self.rules[start]),))
        return draft


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


def entries(kind: str, lines: list[str]) -> list[Entry]:
    """The forms of each word of a list of this kind.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in _FORMS:
        raise ValueError(f"{kind!r} is not a kind of word list; known: {', '.join(_FORMS)}")
    if kind in ("phrase", "fact"):
        words = [[column.strip() for column in line.split("|" if kind == "fact" else "\n")] for line in lines]
    else:
        words = [token.replace("_", " ").split(":") for line in lines for token in line.split()]
    pronouns: dict[str, str] = {}
    found = []
    for word, *forms in words:
        if kind == "name" and word in _PRONOUNS:
            pronouns = _PRONOUNS[word]
        else:
            found.append(_with_capitals({"": word, **_FORMS[kind](word, *forms), **pronouns}))
    return found


def _verb(word: str, before: str = "", ing: str = "") -> Entry:
    tail = word.partition(" ")[2]

    def whole(form: str) -> str:
        return f"{form} {tail}" if tail and " " not in form else form

    forms = {"d": whole(before) if before else past(word), "ing": whole(ing) if ing else gerund(word)}
    return {"s": third_person(word), **forms}


_FORMS: dict[str, Callable[..., Entry]] = {
    "noun": lambda word, many="": {"a": with_article(word), "s": many or plural(word)},
    "verb": _verb,
    "adjective": lambda word: {"a": with_article(word)},
    "name": lambda word: {},
    "phrase": lambda word: {},
    "fact": lambda word, meaning, *more: {"is": meaning, **{f"is{i}": text for i, text in enumerate(more, 2)}},
}


def _with_capitals(forms: Entry) -> Entry:
    # "His" is "his" with a capital; the plain form's capital is "C".
    big = {(key[0].upper() + key[1:]) if key else "C": text[0].upper() + text[1:] for key, text in forms.items()}
    return {**forms, **big}
