"""The report's tables and sentences as plain data, which Markdown, HTML, CSV and the console then print.

Everything a reader could be misled by is a sentence here rather than a footnote: what one seed cannot tell, trials that
saw different amounts of data, a model worse than word frequencies, and every point that has no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from scipy.special import stdtr

from services.report.lambda_axis import horizon_text, lambda_text
from services.report.seed_spread import SEPARATED_AT_SD, Configuration, LayerDecay, SizeRanking, over_layers
from services.study.result import Omission, StudySummary, TrialResult


@dataclass(frozen=True, kw_only=True)
class Table:
    """A header and rows of text; `numeric` says which columns are aligned to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()


def loss_table(ranking: SizeRanking) -> Table:
    """Held-out loss of every configuration of one size, lowest first. Nats per token."""
    marked = ranking.pooled_sd is not None
    bits = any(t.bits_per_byte is not None for c in ranking.rows for t in c.trials)
    recall = any(c.accuracy is not None for c in ranking.rows)
    header = ["rank", "method", "size", "seeds", "parameters"]
    header += ["state size", "accuracy"] if recall else []
    header += ["held-out loss", "above best"]
    header += ["not separated from rank"] if marked else []
    header += ["unigram entropy", "below unigram", "train loss (last 100)"]
    header += ["bits per byte"] if bits else []
    header += ["tokens/s"]
    rows = [_loss_row(ranking, row, marked=marked, bits=bits, recall=recall) for row in ranking.rows]
    return Table(header=tuple(header), rows=tuple(rows), numeric=frozenset(header) - {"method", "size"})


def decay_table(ranking: SizeRanking) -> Table:
    """λ before and after training in the first, middle and last layer and over all layers, in the order of rank."""
    depths = {len(c.trained()) for c in ranking.rows} - {0}
    shown = {d: sorted({1, (d + 1) // 2, d}) for d in depths}
    if len(depths) == 1:
        names = [f"layer {i}" for i in next(iter(shown.values()))]
    else:
        names = ["first layer", "middle layer", "last layer"]
        shown = {d: [1, (d + 1) // 2, d] for d in depths}
    header = ("rank", "method", *names, "median of layers", "remembers (tokens)")
    rows = tuple(_decay_row(c, shown, len(names)) for c in ranking.rows)
    return Table(header=header, rows=rows, numeric=frozenset(header) - {"method"})


def trial_table(results: Sequence[TrialResult]) -> Table:
    """One line a trial: what is needed to find it again and to prove that it is the same."""
    header = (
        "trial",
        "id",
        "seed",
        "held-out loss",
        "steps",
        "tokens",
        "wall s",
        "world",
        "ZeRO",
        "weights",
        "order",
        "run",
    )
    rows = tuple(
        (
            t.name, t.trial_id, str(t.seed), f"{t.held_out_loss:.4f}", f"{t.steps:,}", f"{t.tokens:,}",
            f"{t.wall_s:,.0f}", _ranks(t), str(t.zero_stage), t.weights_sha256[:12], t.order_hash[:12],
            t.mlflow_run_id or "none",
        )
        for t in sorted(results, key=lambda t: (t.name, t.seed, t.trial_id))
    )  # fmt: skip
    numeric = frozenset({"seed", "held-out loss", "steps", "tokens", "wall s", "world", "ZeRO"})
    return Table(header=header, rows=rows, numeric=numeric)


def _ranks(trial: TrialResult) -> str:
    """The numbers of ranks that trained a trial, one after the other."""
    return " then ".join(map(str, trial.world_sizes or (trial.world_size,)))


def omission_table(summary: StudySummary) -> Table:
    """Every trial and point without a result: failed first, then unfinished, then refused."""
    parts: list[tuple[str, Sequence[Omission]]] = [
        ("failed", summary.failed),
        ("unfinished", summary.unfinished),
        ("refused", summary.refused),
    ]
    rows = tuple((label, o.name, o.reason) for label, omissions in parts for o in omissions)
    return Table(header=("what", "trial or point", "reason"), rows=rows)


def fact_table(summary: StudySummary, results: Sequence[TrialResult]) -> Table:
    """What the study ran on."""
    seeds = sorted({t.seed for t in results})
    rows = [
        ("data", summary.data),
        ("tokenizer", summary.tokenizer),
        ("held-out tokens", f"{summary.held_out_tokens:,}"),
        ("unigram entropy of the held-out tokens", f"{summary.unigram_entropy:.4f} nats per token"),
        ("trials", counts_sentence(summary)),
        ("seeds", ", ".join(map(str, seeds)) or "none"),
        ("trained on", _range([t.tokens for t in results], "tokens")),
        ("optimizer steps", _range([t.steps for t in results], "steps")),
        ("tracking", summary.tracking_uri or "none"),
    ]
    return Table(header=("", ""), rows=tuple(rows))


def counts_sentence(summary: StudySummary) -> str:
    """'12 planned: 10 finished, 1 failed, 1 unfinished; 2 points refused before planning'."""
    unfinished = len(summary.unfinished) + summary.n_unnamed
    counts = f"{summary.n_finished} finished, {summary.n_failed} failed, {unfinished} unfinished"
    points = "point" if summary.n_refused == 1 else "points"
    return f"{summary.n_trials} planned: {counts}; {summary.n_refused} {points} refused before planning"


def headline(ranking: SizeRanking) -> str:
    """The one sentence a reader takes away, with its own doubt in it."""
    best, others = ranking.rows[0], ranking.rows[1:]
    start = f"{ranking.size}: the lowest held-out loss is {best.held_out_loss:.4f} nats per token, by {best.label}"
    if not others:
        return f"{start}. It is the only method with a result."
    start += f", {ranking.above_best(others[0]):.4f} below {others[0].label}."
    if ranking.pooled_sd is None:
        return f"{start} One seed each: whether another seed would keep this order is not known."
    ties = len(ranking.not_separated(best))
    if ties:
        verb = "method is" if ties == 1 else "methods are"
        return f"{start} {ties} other {verb} not separated from it by the spread between seeds."
    return f"{start} No other method is within two standard deviations of it."


def noise_sentences(ranking: SizeRanking) -> list[str]:
    """What the seeds of one size can tell, and what they cannot."""
    counts = sorted({len(c.trials) for c in ranking.rows})
    if ranking.pooled_sd is None:
        return [
            f"Every method at size {ranking.size} was trained once, so there is no noise floor: the order below is "
            "what happened in these runs, and nothing here tells a difference between methods from the difference "
            "another seed would make. Small differences need at least three seeds each before they mean anything."
        ]
    freedom = ranking.degrees_of_freedom
    degrees = "degree" if freedom == 1 else "degrees"
    by_chance = 200 * float(stdtr(freedom, -SEPARATED_AT_SD))
    sentences = [
        f"Standard deviation between seeds at size {ranking.size}, pooled over the methods with several: "
        f"**{ranking.pooled_sd:.4f}** nats per token ({freedom} {degrees} of freedom). Two methods are called not "
        f"separated when their mean losses differ by at most {SEPARATED_AT_SD:.0f}·s·√(1/n₁ + 1/n₂). With so many "
        f"degrees of freedom, {by_chance:.0f} % of pairs that are truly equal are called separated all the same."
    ]
    close = sum(len(ranking.not_separated(c)) for c in ranking.rows) // 2
    pairs = len(ranking.rows) * (len(ranking.rows) - 1) // 2
    if pairs:
        sentences.append(f"Not separated: {close} of {pairs} pair{'' if pairs == 1 else 's'} of methods.")
    if len(counts) > 1:
        sentences.append(
            f"The methods have between {counts[0]} and {counts[-1]} seeds; one with a single seed borrows the others' spread."
        )
    if ranking.pooled_sd == 0.0:
        sentences.append("A spread of exactly zero means that the seed changed nothing: check that it is used.")
    return sentences


def comparability_sentences(summary: StudySummary, results: Sequence[TrialResult]) -> list[str]:
    """Reasons why the losses may not be comparable, and whether the data order was the same."""
    sentences = []
    if len(results) != summary.n_finished:
        sentences.append(f"The study counts {summary.n_finished} finished trials, but {len(results)} results are given.")
    for what, values in (
        ("tokens trained on", {t.tokens for t in results}),
        ("vocabulary size", {t.vocab_size for t in results}),
        ("held-out unigram entropy", {t.unigram_entropy for t in results}),
    ):
        if len(values) > 1:
            between = f"{min(values):,} to {max(values):,}"
            sentences.append(f"The trials differ in {what} ({between}): their losses are not comparable.")
    worse = sorted(t.name for t in results if t.held_out_loss >= t.unigram_entropy)
    if worse:
        sentences.append(f"No better than token frequencies alone: {', '.join(worse)}.")
    return sentences + _order_sentences(results)


def accuracy_text(row: Configuration) -> str:
    """'93.8 % ± 1.2 %', or 'none' on text."""
    if row.accuracy is None:
        return "none"
    return f"{100 * row.accuracy:.1f} %" + (f" ± {100 * row.accuracy_sd:.1f} %" if row.accuracy_sd is not None else "")


def recall_sentences(rankings: Sequence[SizeRanking]) -> list[str]:
    """What the accuracy is, and who has the highest; nothing on text."""
    rows = [row for ranking in rankings for row in ranking.rows if row.accuracy is not None]
    if not rows:
        return []
    best = max(rows, key=lambda row: (row.accuracy or 0.0, -(row.state_size or 0)))
    return [
        "An answer is right when the likeliest token of the vocabulary is the one that was asked for. The state is what the "
        "model keeps of a sequence of the trained length: keys and values of every token for softmax attention.",
        f"The highest accuracy is {accuracy_text(best)}, by {best.label} at size {best.size}.",
        *(["Where recipes vary, the figure has the most accurate of each method."] if best.trials[0].varied else []),
    ]


def rank_list(ranks: Sequence[int]) -> str:
    """[2, 3, 4, 7] as '2–4, 7'; 'none' for an empty list."""
    if not ranks:
        return "none"
    breaks = [i for i, (a, b) in enumerate(pairwise(ranks), start=1) if b != a + 1]
    runs = [ranks[i:j] for i, j in zip([0, *breaks], [*breaks, len(ranks)], strict=True)]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _order_sentences(results: Sequence[TrialResult]) -> list[str]:
    orders: dict[tuple[int, int], set[str]] = {}
    trials: dict[tuple[int, int], int] = {}
    for t in results:
        orders.setdefault((t.seed, t.tokens), set()).add(t.order_hash)
        trials[t.seed, t.tokens] = trials.get((t.seed, t.tokens), 0) + 1
    mixed = sorted({seed for (seed, _), hashes in orders.items() if len(hashes) > 1})
    if mixed:
        seeds = ", ".join(map(str, mixed))
        return [f"Trials of seed {seeds} did not read the same tokens in the same order (order hashes differ)."]
    if any(n > 1 for n in trials.values()):
        return ["All trials of one seed read the same tokens in the same order (their order hashes are equal)."]
    return []


def _loss_row(ranking: SizeRanking, row: Configuration, *, marked: bool, bits: bool, recall: bool) -> tuple[str, ...]:
    loss = f"{row.held_out_loss:.4f}" + (f" ± {row.seed_sd:.4f}" if row.seed_sd is not None else "")
    above = ranking.above_best(row)
    cells = [str(row.rank), row.label, row.size, str(len(row.trials)), f"{row.parameters:,}"]
    cells += [f"{row.state_size:,}" if row.state_size is not None else "unknown", accuracy_text(row)] if recall else []
    cells += [loss, "best" if row.rank == 1 else f"+{above:.4f}"]
    cells += [rank_list(ranking.not_separated(row))] if marked else []
    cells += [f"{row.unigram_entropy:.4f}", f"{row.unigram_entropy - row.held_out_loss:.4f}", f"{row.train_loss:.4f}"]
    if bits:
        known = [t.bits_per_byte for t in row.trials if t.bits_per_byte is not None]
        cells += [f"{sum(known) / len(known):.4f}" if known else "none"]
    return (*cells, f"{row.tokens_per_second:,.0f}")


def _decay_row(row: Configuration, shown: dict[int, list[int]], columns: int) -> tuple[str, ...]:
    trained, initial = row.trained(), row.initial()
    if not trained:
        return (str(row.rank), row.label, *["none"] * (columns + 2))
    cells = [_change(initial, trained, layer) for layer in shown[len(trained)]]
    before, after = over_layers(initial), over_layers(trained)
    assert before is not None and after is not None
    memory = f"{horizon_text(before)} → {horizon_text(after)}"
    return (str(row.rank), row.label, *cells, f"{lambda_text(before)} → {lambda_text(after)}", memory)


def _change(initial: Sequence[LayerDecay], trained: Sequence[LayerDecay], layer: int) -> str:
    return f"{lambda_text(initial[layer - 1].median)} → {lambda_text(trained[layer - 1].median)}"


def _range(values: Sequence[int], unit: str) -> str:
    if not values:
        return "none"
    low, high = min(values), max(values)
    return f"{low:,} {unit} a trial" if low == high else f"{low:,} to {high:,} {unit} a trial"
