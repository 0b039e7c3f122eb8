"""A plan as tables for a terminal or a log: trials with their cost, memory on a GPU, refused cells by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.study.cells import by_reason
from services.study.file import Study
from services.study.forecast import Asked, Forecast, forecast
from services.study.match import residual
from services.study.memory import STAGES
from services.study.plan import Plan, Trial, make_plan
from services.study.show import duration
from services.study.show_published import Published

LEFT = frozenset({
    "trial", "id", "rate", "state", "published", "kind", "reason", "refused point", "nearest valid point", "largest trial",
})  # fmt: skip


def show_plan(study: Study, console: Console, asked: Asked | None = None) -> Plan:
    """Prints the plan of a study; returns it. Writes nothing. Raises StudyError as `make_plan` does."""
    plan = make_plan(study)
    seen = forecast(plan, asked or Asked())
    published = Published(plan.trials)
    console.print(_trials(seen, published))
    for line in [_sum(seen), *_sources(seen), *_ledger(seen), *_over_budget(seen)]:
        console.print(escape(line), soft_wrap=True)
    if seen.asked.gpu:
        console.print(_memory(seen))
        for line in _too_large(seen):
            console.print(escape(line), soft_wrap=True)
    if plan.refused:
        for table in _refused(plan):
            console.print(table)
    for line in published.lines() if published else []:
        console.print(escape(line))
    return plan


def _trials(seen: Forecast, published: Published) -> Table:
    plan, targets = seen.plan, _targets(seen.plan)
    title = f"plan of {plan.study.name}: {plan.study.question.strip()}"
    matching = ("GLU width", "off by") if targets else ()
    costly = ("cost",) if seen.asked.price is not None else ()
    linked = ("published",) if published else ()
    columns = ("trial", "id", "parameters", *matching, "tokens", "PFLOP", "about", "rate", *costly, "state", *linked)
    table = _table(title, columns)
    for trial in plan.trials:
        match = [str(trial.config.size.glu_dim), f"{residual(trial.config, targets[trial.size]):+.4%}"] if targets else []
        money = seen.money([trial])
        table.add_row(
            trial.name,
            trial.id,
            f"{trial.parameters:,}",
            *match,
            f"{trial.tokens:,}",
            f"{trial.flops / 1e15:,.3g}",
            duration(seen.seconds(trial)),
            seen.rates.of(trial).kind,
            *([] if money is None else [f"{money:,.2f}"]),
            seen.states[trial.id].state,
            *([escape(published.cell(trial))] if published else []),
        )
    return table


def _targets(plan: Plan) -> dict[str, int]:
    """The parameters that each size is matched to: those of its first point; empty without `match`."""
    if plan.study.match == "none":
        return {}
    return {trial.size: trial.parameters for trial in reversed(plan.trials)}


def _sum(seen: Forecast) -> str:
    plan, resources = seen.plan, seen.plan.study.resources
    return (
        f"{len(plan.trials)} trials, {plan.backend} backend, {resources.workers} worker(s) each "
        f"(ZeRO {resources.zero_stage}, {resources.gpus_per_worker:g} GPU, {resources.cpus_per_worker:g} CPU a worker); "
        f"about {_spent(seen, plan.trials)} in all; "
        f"{plan.disk_bytes(plan.trials) / 2**30:.2f} GiB of checkpoints and weights."
    )


def _spent(seen: Forecast, trials: Sequence[Trial]) -> str:
    gpu, money = seen.asked.gpu, seen.money(trials)
    unit = f"{gpu.name}-hours" if gpu else "GPU-hours" if seen.on_gpus else "worker-hours"
    cost = "" if money is None else f" ({money:,.2f} at {seen.asked.price:g} each)"
    return f"{seen.device_hours(trials):,.3g} {unit}{cost}"


def _sources(seen: Forecast) -> list[str]:
    """Where the figures of the column `rate` are from, once each."""
    found = dict.fromkeys((rate.kind, rate.source) for rate in map(seen.rates.of, seen.plan.trials))
    rates = {rate.kind: rate.gflops for rate in map(seen.rates.of, seen.plan.trials)}
    return [f"rate {kind}: {rates[kind]:,.0f} GFLOP/s a worker ({source})." for kind, source in found]


def _ledger(seen: Forecast) -> list[str]:
    if seen.unread:
        return [f"What is finished already is not known: {seen.unread}."]
    done = len(seen.plan.trials) - len(seen.to_do)
    if not done:
        return []
    disk = seen.plan.disk_bytes(seen.to_do) / 2**30
    return [f"{done} finished, {len(seen.to_do)} to do: about {_spent(seen, seen.to_do)} and {disk:.2f} GiB left."]


def _over_budget(seen: Forecast) -> list[str]:
    bound, workers = seen.plan.study.budget.max_hours, seen.plan.study.resources.workers
    hours = sum(map(seen.seconds, seen.plan.trials)) * workers / 3600
    if bound is None or hours <= bound:
        return []
    return [f"Warning: at these rates the plan needs {hours:.2f} worker-hours, more than budget.max_hours {bound:g}."]


def _memory(seen: Forecast) -> Table:
    """GiB of one rank by ZeRO stage, for the largest trial of each size."""
    gpu, resources = seen.asked.gpu, seen.plan.study.resources
    title = f"GiB on each GPU by ZeRO stage (this study: {resources.zero_stage})" + (
        f"; one {gpu.name} has {gpu.memory_gib:g}" if gpu else ""
    )
    columns = ("largest trial", "micro-batch", "activations", *(f"ZeRO {stage}" for stage in STAGES))
    table = _table(title, columns)
    for size in dict.fromkeys(trial.size for trial in seen.plan.trials):
        trial = max((one for one in seen.plan.trials if one.size == size), key=lambda one: seen.memory(one).total)
        micro = resources.micro_batch_size or trial.recipe.batch_size // resources.workers
        stages = [f"{seen.memory(trial, stage).total / 2**30:.1f}" for stage in STAGES]
        table.add_row(trial.name, str(micro), f"{seen.memory(trial).activations / 2**30:.1f}", *stages)
    return table


def _too_large(seen: Forecast) -> list[str]:
    """One line per remedy, with how many trials need it."""
    if seen.asked.gpu is None:
        return []
    large = [trial for trial in seen.plan.trials if not seen.fits(trial)]
    remedies = Counter(map(seen.remedy, large))
    return [
        f"Warning: {count} of {len(seen.plan.trials)} trials do not fit on one {seen.asked.gpu.name} as the study says; "
        f"they do with {remedy}."
        for remedy, count in remedies.items()
    ]


def _refused(plan: Plan) -> list[Table]:
    """Reasons with their counts, then every refused cell with the number of its reason."""
    kinds = Counter(cell.kind for cell in plan.refused).most_common()
    said = ", ".join(f"{count} {kind}" for kind, count in kinds)
    reasons = _table(f"{len(plan.refused)} cells refused: {said}", ("no.", "cells", "kind", "reason"), fold="reason")
    every = _table("", ("refused point", "no.", "nearest valid point"))
    for number, cells in enumerate(by_reason(plan.refused), 1):
        reasons.add_row(str(number), str(len(cells)), cells[0].kind, escape(cells[0].reason))
        for cell in cells:
            every.add_row(cell.name, str(number), cell.nearest or "none")
    return [reasons, every]


def _table(title: str, columns: Sequence[str], fold: str = "") -> Table:
    table = Table(title=escape(title) or None, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=name != fold)
    return table
