"""Ranks what was measured, and says which differences are larger than what another seed would make.

A configuration is one method at one size; its trials differ in nothing but the seed. Sizes are never ranked against
each other. The noise floor is the standard deviation between seeds, pooled over the configurations of a size that have
at least two: s² = Σ(nᵢ−1)sᵢ² / Σ(nᵢ−1). With one seed each there is no noise floor, and none is made up.

Surprising: trials of one seed read the same tokens in the same order, so part of the spread between seeds is common to
all methods. Treating it as independent makes the test below cautious rather than bold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from services.study.result import LayerProfile, TrialResult

# In units of the standard deviation of a difference. The report prints how often equal pairs exceed it by chance.
SEPARATED_AT_SD = 2.0


@dataclass(frozen=True, kw_only=True)
class LayerDecay:
    """λ in one layer: the median over the seeds of each trial's median and quartiles."""

    layer: int
    median: float
    p25: float
    p75: float


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One method at one size with all its trials, ordered by seed. Losses are nats per token."""

    method: str
    size: str
    label: str
    trials: tuple[TrialResult, ...]
    rank: int = 0

    @property
    def held_out_loss(self) -> float:
        """Mean over the seeds."""
        return fmean(t.held_out_loss for t in self.trials)

    @property
    def seed_sd(self) -> float | None:
        """Standard deviation of the held-out loss between seeds (n−1), None with one seed."""
        return stdev(t.held_out_loss for t in self.trials) if len(self.trials) > 1 else None

    @property
    def train_loss(self) -> float:
        """Training loss over the last 100 steps, mean over the seeds."""
        return fmean(t.train_loss_last_100 for t in self.trials)

    @property
    def published_loss(self) -> float | None:
        """The training loss that the paper prints for this point at this size; None where it has no such run."""
        return self.trials[0].published_loss

    @property
    def above_published(self) -> float | None:
        """Training loss over the last 100 steps less the published one."""
        return None if self.published_loss is None else self.train_loss - self.published_loss

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the held-out token frequencies, mean over the seeds (they share one text)."""
        return fmean(t.unigram_entropy for t in self.trials)

    @property
    def tokens_per_second(self) -> float:
        """Training speed, mean over the seeds."""
        return fmean(t.tokens_per_second for t in self.trials)

    @property
    def accuracy(self) -> float | None:
        """Share of held-out answers of a recall task that are right, mean over the seeds; None on text."""
        return fmean(self._accuracies) if self._accuracies else None

    @property
    def accuracy_sd(self) -> float | None:
        """Standard deviation of the accuracy between seeds (n−1), None with one seed."""
        return stdev(self._accuracies) if len(self._accuracies) > 1 else None

    @property
    def _accuracies(self) -> list[float]:
        return [t.held_out_accuracy for t in self.trials if t.held_out_accuracy is not None]

    @property
    def state_size(self) -> int | None:
        """Numbers that the model keeps of one sequence; None in results that do not say."""
        return self.trials[0].state_size

    @property
    def parameters(self) -> int:
        """Parameter count, embeddings included."""
        return self.trials[0].parameters

    @property
    def kind(self) -> str:
        """'scalar', 'vector', 'vector, shared' …: how the point spreads λ over channels; 'no' where there is no λ."""
        point = self.trials[0].point
        if not self.trained():
            return "no"
        return f"{point['granularity']}, shared" if point["share"] else str(point["granularity"])

    def trained(self) -> tuple[LayerDecay, ...]:
        """λ per layer with the final weights."""
        return _over_seeds([t.decay_profile for t in self.trials])

    def initial(self) -> tuple[LayerDecay, ...]:
        """λ per layer before the first step."""
        return _over_seeds([t.initial_decay_profile for t in self.trials])


@dataclass(frozen=True, kw_only=True)
class SizeRanking:
    """The configurations of one size, lowest held-out loss first, with the noise floor of that size."""

    size: str
    rows: tuple[Configuration, ...]
    pooled_sd: float | None
    degrees_of_freedom: int

    def above_best(self, row: Configuration) -> float:
        """Nats per token above the best configuration of this size."""
        return row.held_out_loss - self.rows[0].held_out_loss

    def sd_of_difference(self, a: Configuration, b: Configuration) -> float | None:
        """Standard deviation of the difference between two mean losses: s·√(1/n_a + 1/n_b); None without a floor."""
        if self.pooled_sd is None:
            return None
        return self.pooled_sd * math.sqrt(1 / len(a.trials) + 1 / len(b.trials))

    def not_separated(self, row: Configuration) -> list[int]:
        """Ranks of the other configurations whose loss is within two standard deviations of this one's."""
        return [o.rank for o in self.rows if o is not row and self._too_close(row, o)]

    def _too_close(self, a: Configuration, b: Configuration) -> bool:
        sd = self.sd_of_difference(a, b)
        return sd is not None and abs(a.held_out_loss - b.held_out_loss) <= SEPARATED_AT_SD * sd


def rank_by_size(results: Sequence[TrialResult]) -> list[SizeRanking]:
    """Group trials into configurations and rank them within each size, smallest size first.

    Raises ValueError when a trial is given twice or two trials of a configuration have the same seed.
    """
    groups: dict[tuple[str, str, str], list[TrialResult]] = {}
    seen: set[str] = set()
    for trial in sorted(results, key=lambda t: (t.size, t.method, t.seed, t.trial_id)):
        if trial.trial_id in seen:
            raise ValueError(f"trial {trial.trial_id} ({trial.name}) is given twice; pass each result once")
        seen.add(trial.trial_id)
        groups.setdefault((trial.size, trial.method, _without_seed(trial)), []).append(trial)
    configurations = [_configuration(key, trials) for key, trials in groups.items()]
    by_size: dict[str, list[Configuration]] = {}
    for configuration in configurations:
        by_size.setdefault(configuration.size, []).append(configuration)
    smallest_first = sorted(by_size.items(), key=lambda item: (min(c.parameters for c in item[1]), item[0]))
    return [_ranking(size, rows) for size, rows in smallest_first]


def _configuration(key: tuple[str, str, str], trials: list[TrialResult]) -> Configuration:
    size, method, stem = key
    seeds = [t.seed for t in trials]
    if len(set(seeds)) < len(seeds):
        repeated = next(s for s in seeds if seeds.count(s) > 1)
        raise ValueError(f"{stem} has two trials with seed {repeated}; give trials that differ otherwise other names")
    extra = stem.removeprefix(method).removeprefix(f"-{size}").strip("-")
    label = f"{method} ({extra})" if extra and stem.startswith(method) else method
    return Configuration(method=method, size=size, label=label, trials=tuple(trials))


def _ranking(size: str, rows: list[Configuration]) -> SizeRanking:
    ordered = sorted(rows, key=lambda c: (c.held_out_loss, c.label))
    ranked = tuple(
        Configuration(method=c.method, size=c.size, label=c.label, trials=c.trials, rank=i)
        for i, c in enumerate(ordered, start=1)
    )
    freedom = sum(len(c.trials) - 1 for c in ranked)
    squares = sum((len(c.trials) - 1) * c.seed_sd**2 for c in ranked if c.seed_sd is not None)
    pooled = math.sqrt(squares / freedom) if freedom else None
    return SizeRanking(size=size, rows=ranked, pooled_sd=pooled, degrees_of_freedom=freedom)


def _without_seed(trial: TrialResult) -> str:
    """The trial's name less its seed: what trials that differ only in the seed have in common."""
    return "-".join(part for part in trial.name.split("-") if part != f"s{trial.seed}")


def _over_seeds(profiles: Sequence[Sequence[LayerProfile]]) -> tuple[LayerDecay, ...]:
    return tuple(
        LayerDecay(
            layer=layers[0].layer,
            median=median(p.median for p in layers),
            p25=median(p.p25 for p in layers),
            p75=median(p.p75 for p in layers),
        )
        for layers in zip(*profiles, strict=True)
    )


def over_layers(decay: Sequence[LayerDecay]) -> float | None:
    """The median of the layers' medians, None without layers; not that of all values pooled, which are not kept."""
    return median(d.median for d in decay) if decay else None
