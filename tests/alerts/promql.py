"""As much of PromQL as it takes to say which metrics and labels an expression names. Whether it is PromQL, promtool says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
    |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<number>\d[\w.]*)
    |(?P<word>[a-zA-Z_:][\w:]*)
    |(?P<sign>=~|!~|!=|==|<=|>=|.)""",
    re.VERBOSE | re.DOTALL,
)
LISTS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS = LISTS | {"and", "or", "unless", "offset", "bool", "inf", "nan"}


@dataclass
class Selector:
    metric: str
    matchers: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Names:
    """What an expression names: its selectors, and each list of labels with the selectors that are to have them."""

    selectors: list[Selector] = field(default_factory=list)
    lists: list[tuple[str, list[str], list[Selector]]] = field(default_factory=list)


def tokens(expression: str) -> list[tuple[str, str]]:
    found = [(match.lastgroup, match.group()) for match in TOKEN.finditer(expression)]
    return [(kind, text) for kind, text in found if kind != "space"]


def names(expression: str) -> Names:
    out, words = Names(), tokens(expression)
    spans: list[tuple[int, Selector]] = []
    lists: list[tuple[str, list[str], int, int]] = []
    at = 0
    while at < len(words):
        kind, text = words[at]
        following = words[at + 1][1] if at + 1 < len(words) else ""
        if kind == "word" and text in LISTS and following == "(":
            end = closing(words, at + 1)
            labels = [text for kind, text in words[at + 2 : end] if kind == "word"]
            # An aggregation looks at what is in the brackets behind; a join at both sides.
            scope = (end + 1, closing(words, end + 1)) if text in {"by", "without"} else (0, len(words))
            lists.append((text, labels, *scope))
            at = end + 1
        elif kind == "word" and text not in WORDS and following != "(" and not is_aggregation(words, at):
            selector = Selector(text)
            spans.append((at, selector))
            if following == "{":
                end = closing(words, at + 1)
                selector.matchers = list(matchers(words[at + 2 : end]))
                at = end
            at += 1
        else:
            at += 1
    out.selectors = [selector for _, selector in spans]
    for what, labels, start, end in lists:
        out.lists.append((what, labels, [selector for place, selector in spans if start <= place <= end]))
    return out


def is_aggregation(words: list[tuple[str, str]], at: int) -> bool:
    return words[at + 1 : at + 2] in ([("word", "by")], [("word", "without")])


def matchers(words: list[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    for label, how, value in zip(words, words[1:], words[2:]):
        if label[0] == "word" and how[1] in {"=", "!=", "=~", "!~"} and value[0] == "string":
            yield label[1], how[1], value[1][1:-1].replace("\\\\", "\\")


def closing(words: list[tuple[str, str]], at: int) -> int:
    assert words[at][1] in "({", f"no bracket at {words[at:]}"
    depth = 0
    for place in range(at, len(words)):
        depth += (words[place][1] in "({[") - (words[place][1] in ")}]")
        if depth == 0:
            return place
    raise AssertionError("a bracket is not closed")
