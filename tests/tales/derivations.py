"""An exhaustive parser of the grammar of `tales`: the proof that a text's probability is that of its derivation."""

from __future__ import annotations

import functools
import math
from typing import Any

from smolforge import tales
from smolforge.tales.grammar import ALT, OWN, SAY, SUB, Grammar


def derivations_of_document(text: str) -> list[float]:
    """The bits of every derivation of `text`: none where `tales` never writes it.

    One item is the proof that 2**-bits is the probability of the text itself.
    """
    shares = sum(genre.share for genre in tales.GENRES)
    return [
        bits + math.log2(shares / genre.share)
        for genre in tales.GENRES
        for _, bits in derivations(tales.language(), genre.rule, text)
    ]


def derivations(grammar: Grammar, start: str, text: str | None) -> list[tuple[str, float]]:
    """Every way in which `start` can produce `text`, as (text, bits); the whole language where text is None.

    Exhaustive: each choice is tried with every alternative that it could have given, and a branch is left only
    when what it wrote differs from the text. One item means that the text's probability is 2**-bits.
    """
    found = []
    # (what is left to write as a linked list, text so far, bound words, what was taken, bits)
    stack: list[tuple] = [(((SUB, grammar.rules[start]), None), "", {}, {}, 0.0)]
    while stack:
        agenda, done, bound, taken, bits = stack.pop()
        if agenda is None:
            if text is None or done == text:
                found.append((done, bits))
            continue
        part, rest = agenda
        if isinstance(part, str) or part[0] == SAY:
            said = done + (part if isinstance(part, str) else bound[part[1]][part[2]])
            if text is None or text.startswith(said):
                stack.append((rest, said, bound, taken, bits))
        elif part[0] == ALT:
            cost = bits + math.log2(len(part[1]))
            stack.extend((_chain(choice, rest), done, bound, taken, cost) for choice in part[1])
        elif part[0] == SUB and part[1].weights is not None:
            for choice, weight in zip(part[1].alternatives, part[1].weights, strict=True):
                cost = -math.log2(weight / part[1].bounds[-1])
                stack.append((_chain(choice, rest), done, bound, taken, bits + cost))
        else:
            source = bound[part[1][0]][part[1][1]] if part[0] == OWN else part[1]
            given = taken.get(source, ())
            given = () if len(given) >= source.size else given
            cost = bits + math.log2(source.size - len(given))
            for index in range(source.size):
                if index in given:
                    continue
                now = {**taken, source: (*given, index)}
                if part[0] == SUB:
                    stack.append((_chain(source.alternatives[index], rest), done, bound, now, cost))
                    continue
                entry = source.entries[index]
                said = done + entry[part[3]]
                if text is None or text.startswith(said):
                    names = {**bound, part[2]: entry} if part[2] else bound
                    stack.append((rest, said, names, now, cost))
    return found


def _chain(parts: tuple, rest: Any) -> Any:
    return functools.reduce(lambda tail, part: (part, tail), reversed(parts), rest)
