"""How much of a reference's wording a text has: BLEU and ROUGE-L of one text against one reference.

Words are those of roleplay/measures.py (runs of letters and digits, in lower case), not NLTK's tokens, so figures are
near those of CoSER's repository and not equal to them.
"""

from __future__ import annotations

from collections.abc import Sequence

from her_nemo.roleplay.measures import bleu_to_others, words


def bleu(text: str, reference: str) -> float:
    """BLEU-4 (Papineni et al. 2002) with brevity penalty, unsmoothed, in [0, 1]."""
    return bleu_to_others([words(text), words(reference)])[0]


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), in [0, 1]; 0 where either has no words."""
    found, wanted = words(text), words(reference)
    common = _longest_common_subsequence(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length; time len(one) x len(other), memory len(other)."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, candidate in enumerate(other, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == candidate else max(above, row[place - 1])
            diagonal = above
    return row[-1]
