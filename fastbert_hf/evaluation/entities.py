"""Entities in a row of tags such as `B-PER I-PER O`."""

from __future__ import annotations

from collections.abc import Sequence


# Prefixes with which an entity begins, or ended before, in IOB2, IOBES and BILOU. All others go on.
BEGINS, ENDED = frozenset("BSU"), frozenset("ESLU")


def entities_of(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """
    Return the entities of a text as `(type, first, last)`, by the rule of the CoNLL shared tasks (Tjong Kim Sang and
    De Meulder, 2003): one that begins without its B begins all the same. A tag without a prefix is a type.

    Args:
        tags (sequence of `str`): One for each word or token.
    """
    found, first, kind_before, prefix_before = set(), 0, None, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, has_prefix, kind = tag.partition("-")
        if not has_prefix:
            prefix, kind = "I", tag
        kind = None if tag == "O" else kind
        if kind != kind_before or prefix in BEGINS or prefix_before in ENDED:
            if kind_before is not None:
                found.add((kind_before, first, place - 1))
            first = place
        kind_before, prefix_before = kind, prefix
    return found


def are_tags(labels: Sequence[str]) -> bool:
    """Tell whether labels are tags of entities: `O`, and others with a prefix."""
    return "O" in labels and all(label == "O" or label[1:2] == "-" for label in labels)
