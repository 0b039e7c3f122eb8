"""Verdicts on the paper's takeaways as lines for a terminal: the claim, then every size with its answer and figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from services.report.claims import FAILS, HOLDS, NOT_TESTABLE, Case, Claim, Place, Verdict

NAMED = 3  # missing rows that are named; a study of two points lacks most rows of most claims
NOISE = 0.01  # nats: the least that one logged training step differs from the next (erratum printed-loss)


def claim_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """One block of lines per claim, and the counts at the end."""
    lines = []
    for claim, group in itertools.groupby(verdicts, key=lambda verdict: verdict.claim):
        lines += ["", *_heading(claim)]
        for verdict in group:
            lines += _answer(verdict)
    return [*lines[1:], "", _counts(verdicts)]


def _heading(claim: Claim) -> list[str]:
    bounds = " and ".join(f"{how} {bound:g}" for how, bound in claim.expect.items())
    of = "difference of " if claim.pairs[0][1] is not None else ""
    return [
        f"{claim.id} ({claim.section}): {claim.statement}",
        f"  {of}{_words(claim.measure)} {bounds}, {claim.quantifier} of {len(claim.pairs)}"
        + (f"; beware: {', '.join(claim.beware)}" if claim.beware else ""),
    ]


def _answer(verdict: Verdict) -> Iterator[str]:
    close = f" (closest by {verdict.closest:.3f})" if verdict.closest is not None else ""
    yield f"  {_where(verdict.place)}: {verdict.answer}{close}"
    yield from (f"    {_figure(case)}" for case in verdict.cases if case.value is not None)
    if missing := verdict.missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        yield f"    no {_words(verdict.claim.measure)} of {', '.join(missing[:NAMED])}{more}"


def _words(measure: str) -> str:
    return measure.replace("_", " ")


def _where(place: Place) -> str:
    return ", ".join(word for word in (place.size, place.form, place.variant) if word)


def _figure(case: Case) -> str:
    assert case.value is not None and case.room is not None, "a case without rows has no figure"
    return f"{case.value:+.3f}  {case.name}{'' if case.room > 0 else '  (outside)'}"


def _counts(verdicts: Sequence[Verdict]) -> str:
    claims = {verdict.claim.id: [v.answer for v in verdicts if v.claim is verdict.claim] for verdict in verdicts}
    failing = [claim for claim, answers in claims.items() if FAILS in answers]
    holding = [claim for claim, answers in claims.items() if set(answers) == {HOLDS}]
    untested = [claim for claim, answers in claims.items() if set(answers) == {NOT_TESTABLE}]
    noisy = sum(v.closest is not None and v.claim.measure == "loss" and v.closest < NOISE for v in verdicts)
    named = f" ({', '.join(failing)})" if failing else ""
    return (
        f"{len(claims)} claims: {len(holding)} hold wherever they are asked, {len(failing)} fail somewhere{named}, "
        f"{len(untested)} cannot be tested. "
        f"{noisy} of the answers on loss lie within {NOISE:g} nats of their bound: another seed may turn them."
    )
