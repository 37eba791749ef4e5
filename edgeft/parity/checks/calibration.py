"""Does the text that a quantizer was calibrated on contain the text that its result is measured on?

An importance matrix of the test text makes the file look better on it than anywhere else. Two texts about one subject
share phrases all the same, so the limit cannot be zero shared 13-grams. Measured on splits that `edgeft.corpus` made, all
training rows as calibration, the held-out rows as test:

| data | rows | shared 13-grams | largest share of a passage |
|---|---|---|---|
| WordNet medical terms, split by term | 4022 and 212 | 0 of 3,394 | 0 |
| WordNet medical terms, split by clusters | 4022 and 212 | 0.09 % of 3,346 | 8 % |
| GSM8K | 7099 and 374 | 0.15 % of 35,014 | 25 % |
| Human Phenotype Ontology | 8040 and 423 | 1.7 % of 3,761 | 38 % |
| MedQuAD ("inherited in an autosomal recessive pattern, which means …") | 8032 and 423 | 4.2 % of 50,326 | 48 % |

One held-out row added to the calibration text shares 100 % of its own 13-grams, and moves the whole by only 0.1 to 3.6 %:
less than boilerplate does. So each passage is judged by itself, with a limit between 48 and 100 %; the limit on the
whole, well above 4.2 %, finds text that was copied in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from edgeft.corpus.text import ngrams, shortened, words
from edgeft.parity.checks.check import Check

NGRAM = 13
PASSAGE = 200
"""13-grams of a longer test text that are judged together."""
MAX_OF_PASSAGE = 0.8
"""A passage of which this share stands in the calibration text has leaked."""
MAX_SHARE = 0.1
"""Of all distinct 13-grams of the test texts."""


def overlap(calibration: Iterable[str], test: Sequence[str]) -> Check:
    """Whether the texts in `test` stand in `calibration`: runs of 13 words, case-folded, without punctuation.

    Fails when a passage of a test text shares four fifths of its runs, or all of them together more than a tenth. A text of
    fewer than 13 words is one run, found only where it is a text of its own. Only the test's runs are kept in memory.
    """
    passages = [passage for text in test for passage in _passages(text)]
    wanted = {gram for grams, _ in passages for gram in grams}
    if not wanted:
        return _check("the test texts have no words", ok=None)
    found = {gram for text in calibration for gram in _grams(text) if gram in wanted}
    share = len(found) / len(wanted)
    leaked = [
        (grams, first) for grams, first in passages if len(grams & found) >= MAX_OF_PASSAGE * len(grams)
    ]
    if leaked:
        grams, first = leaked[0]
        return _check(
            f"{len(leaked)} of {len(passages)} passages of the test text stand in the calibration text, the first with "
            f"{len(grams & found) / len(grams):.0%} of its {NGRAM}-grams: {shortened(first, 80)!r}",
            ok=False,
        )
    most = max(len(grams & found) / len(grams) for grams, _ in passages)
    said = (
        f"{share:.2%} of the test text's {len(wanted):,} distinct {NGRAM}-grams stand in the calibration text, "
        f"at most {most:.0%} of one passage"
    )
    return _check(
        said if share <= MAX_SHARE else f"{said}; the limit is {MAX_SHARE:.0%}", ok=share <= MAX_SHARE
    )


def _check(said: str, *, ok: bool | None) -> Check:
    return Check(step="text", name="calibration text", codes=(), ok=ok, said=said)


def _passages(text: str) -> Iterator[tuple[set[int], str]]:
    """Distinct 13-grams and words of each passage; a short rest belongs to the passage before it."""
    spoken = words(text)
    grams = _grams(text)
    for start in range(0, len(grams), PASSAGE):
        if start and len(grams) - start < PASSAGE // 4:
            break
        end = start + PASSAGE if len(grams) - start - PASSAGE >= PASSAGE // 4 else len(grams)
        yield set(grams[start:end]), " ".join(spoken[start : end + NGRAM - 1])


def _grams(text: str) -> list[int]:
    """As Python's hashes of them: used within one process only, and a tenth of the memory."""
    return [hash(gram) for gram in ngrams(words(text), NGRAM)]
