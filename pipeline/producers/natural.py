"""A small step along the query's gradient, solved against how the corpus's loss bends: loss differences are then influences.

With v = (G + damping I)^-1 grad L(query), a counterpart at theta + eps v has L(i; theta + eps v) - L(i; theta) = eps g_i' (G +
damping I)^-1 g_t + O(eps^2): the influence function (Koh and Liang, 1703.04730) with the Gauss-Newton matrix, by forward passes.

Shapes: Q queries, P numbers of the chosen parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..blocks import Choice, choose, tunable
from ..changes import Added
from ..curvatures import BUILTIN
from ..curvatures.base import Curvature, Parameters, say_first
from ..curvatures.cost import timed
from ..curvatures.gauss_newton import GaussNewton
from ..curvatures.kernel import ENOUGH_ROWS
from ..errors import MAX_NAMES_SHOWN, ContractError, NumericsError
from ..importing import construct
from ..numerics import to_loss_dtype
from ..observe import say, say_seldom
from ..tasks.base import Batch
from .base import Ahead, Chosen, Fitted, Produced, Setting
from .budget import BUDGET_S, LEAST_ROWS, MOST_ROWS, choose_rows
from .damping import choose_damping, dot
from .stepping import Step, Stepper

TOLERANCE = 0.1
"""By how much loss differences may be off from what a straight line gives, relative to that, before it is said."""
RISE_NATS = 0.01
"""Of the query's loss to first order, where scores are derivatives and any length will do: near enough to look at, too."""
GRADIENT_PASSES = 4
"""Through the model, of scoring by gradients: as long as so many forward passes take."""
BLOCK_BYTES = 1 << 30
"""Of vectors that are held to solve for several queries at once."""
VECTORS_HELD = 8
"""Per query, alive in a solve; those in float64 count twice."""


@dataclass(frozen=True, kw_only=True)
class Natural:
    """See SampleProducer; the spec's fields of the same names say what each means."""

    curvature: str | None
    damping: float | None
    damping_share: float | None
    iterations: int
    tolerance: float
    sample_rows: int | None
    budget_s: float | None
    step: float | None
    steps: int
    parameters: str
    last_blocks: int
    direction: ClassVar[int] = 1

    @property
    def is_open(self) -> bool:
        """See SampleProducer."""
        return self.sample_rows is None

    def choose(self, setting: Setting, ahead: Ahead) -> Chosen:
        """See SampleProducer: how many rows, and whether EK-FAC of them takes the place of inverting few directly."""
        if ahead.rows <= LEAST_ROWS:
            return Chosen({"sample_rows": MOST_ROWS})
        parameters, sample = Parameters(setting.base, self._choice(setting).names), setting.sample
        given, most = (setting.base, setting.task, parameters, sample, setting.seed), min(MOST_ROWS, ahead.rows)
        _, pass_s = timed(setting.losses)
        passes = min(1 + ahead.queries, GRADIENT_PASSES)
        scoring_s = passes * ahead.rows * pass_s / sample.rows / ahead.actors
        budget_s = sample.of_first(self.budget_s or max(BUDGET_S, scoring_s))
        word = self.curvature or ("ekfac" if self.damping_share is not None else "gauss_newton")
        cost, fields = sample.of_first(self._curvature(word).cost(*given)), dict[str, Any]()
        if self.curvature is None and cost.most_rows(budget_s, ahead.queries, most) < min(ENOUGH_ROWS, most):
            word, fields = "ekfac", {"curvature": "ekfac"}
            cost = sample.of_first(self._curvature(word).cost(*given))
        return choose_rows(word, cost, budget_s, ahead.queries, most, fields)

    def fit(self, setting: Setting) -> Fitted:
        """See SampleProducer: the curvature's own tensors, and the damping.

        Raises:
            ContractError: No parameter is chosen, or the model or task does not fit the curvature.
            NumericsError: The loss does not bend.
        """
        choice = self._choice(setting)
        parameters = Parameters(setting.base, choice.names)
        word = self.curvature or self._fitting(setting, parameters)
        curvature = self._curvature(word)
        chosen: dict[str, float | str] = {
            name: value
            for name, value in (("damping", self.damping), ("damping_share", self.damping_share))
            if value is not None
        }
        given = (setting.base, setting.task, parameters, setting.sample)
        tensors = curvature.fit(*given, setting.seed)
        if not chosen:
            curvature.load(*given, tensors)
            chosen = choose_damping(setting, parameters, curvature)
        if not chosen:
            raise NumericsError(
                "the corpus's loss does not bend along gradients of its rows: no natural step",
                "is the model certain of all of them, or is the loss a straight line in the model's outputs?",
            )
        return Fitted(tensors, {"curvature": word, **chosen, **choice.details})

    def produce_all(
        self, setting: Setting, queries: Mapping[str, Batch], fitted: Fitted
    ) -> Iterator[tuple[str, Produced | NumericsError]]:
        """See SampleProducer."""
        parameters = Parameters(setting.base, self._choice(setting).names)
        curvature = self._curvature(str(fitted.details["curvature"]))
        curvature.load(setting.base, setting.task, parameters, setting.sample, fitted.tensors)
        stepper, steps = Stepper(setting.base, setting.task, parameters, setting.probe), {}
        block = max(1, BLOCK_BYTES // (VECTORS_HELD * parameters.size * 4))
        query_ids = list(queries)
        for some in (query_ids[start : start + block] for start in range(0, len(query_ids), block)):
            slope_QP = torch.stack([setting.slope(parameters, queries[query_id]) for query_id in some])
            sloping_Q = slope_QP.double().norm(dim=1)
            good_Q = (sloping_Q > 0) & sloping_Q.isfinite()
            for query_id, length in zip(some, sloping_Q.tolist(), strict=True):
                if not 0 < length < math.inf:
                    yield query_id, _without_slope(query_id, length)
            if not good_Q.any():
                continue
            damping = fitted.details.get("damping_share", fitted.details.get("damping", math.nan))
            solve = partial(_solved, curvature, float(damping))
            good = [query_id for query_id, is_good in zip(some, good_Q.tolist(), strict=True) if is_good]
            if setting.first_order and self.step is None and self.steps == 1:
                slope_QP = to_loss_dtype(slope_QP[good_Q])
                for query_id, slope_P, direction_P in zip(good, slope_QP, solve(slope_QP), strict=True):
                    yield query_id, self._along(parameters, stepper, slope_P, direction_P, fitted.details)
                continue
            direction_QP = solve(slope_QP[good_Q])
            expected_QN = stepper.derivatives(direction_QP)
            rise_Q = dot(slope_QP[good_Q], direction_QP).tolist()
            chosen: dict[str, tuple[Step, Tensor]] = {}
            for query_id, direction_P, slope, expected_N in zip(good, direction_QP, rise_Q, expected_QN, strict=True):
                try:
                    chosen[query_id] = stepper.choose(direction_P, slope, expected_N, self.step), direction_P
                except NumericsError as error:
                    yield query_id, NumericsError(f"query {query_id!r}: {error.message}", error.hint)
            for (query_id, (step, _)), change_P in zip(
                chosen.items(), self._walk(stepper, solve, queries, chosen), strict=True
            ):
                steps[query_id] = step
                model, details = stepper.taken(change_P), {**fitted.details, **asdict(step)}
                yield query_id, Produced(model, self.steps, details, scale=step.length)
        _warn_of_bends(steps)

    def _along(
        self,
        parameters: Parameters,
        stepper: Stepper,
        slope_P: Tensor,
        direction_P: Tensor,
        details: Mapping[str, float | str],
    ) -> Produced:
        """A step of no particular length, kept as what is added: scores are derivatives along it."""
        length = RISE_NATS / float(dot(slope_P[None], direction_P[None]))
        change_P = length * direction_P
        added = {name: Added(each) for name, each in parameters.split(change_P).items()}
        found = {**details, "length": length, "rise_nats": RISE_NATS}
        return Produced(stepper.taken(change_P), 1, found, added, scale=length)

    def _walk(
        self,
        stepper: Stepper,
        solve: Callable[[Tensor], Tensor],
        queries: Mapping[str, Batch],
        chosen: Mapping[str, tuple[Step, Tensor]],
    ) -> Sequence[Tensor]:
        """Where the steps lead each query [P]: every one along the query's gradient where the one before ended."""
        lengths = [step.length / self.steps for step, _ in chosen.values()]
        change_QP = [length * direction_P for length, (_, direction_P) in zip(lengths, chosen.values(), strict=True)]
        for _ in range(self.steps - 1 if chosen else 0):
            rows = [queries[query_id] for query_id in chosen]
            slope_QP = torch.stack([stepper.slope(*each) for each in zip(change_QP, rows, strict=True)])
            found = zip(change_QP, lengths, solve(slope_QP), strict=True)
            change_QP = [change_P + length * direction_P for change_P, length, direction_P in found]
        return change_QP

    def _choice(self, setting: Setting) -> Choice:
        """What moves: the same for all queries and at all workers, as the probe is."""
        found = choose(setting.base, setting.task, setting.probe[0], self.parameters, self.last_blocks)
        named = tunable(setting.base)
        real = tuple(name for name in found.names if not named[name].is_complex())
        if not real:
            raise ContractError(
                f"natural: all parameters that are chosen are complex: {', '.join(found.names[:MAX_NAMES_SHOWN])}",
                "curvatures are of real parameters; unlearn and finetune move complex ones too",
            )
        if left := [name for name in found.names if name not in real]:
            say_seldom("complex", f"warning: natural leaves complex parameters as they are: {', '.join(left)}")
        return Choice(real, found.details)

    @cached_property
    def _curvatures(self) -> dict[str, Curvature]:
        """By their words: one for fitting and solving, so that what is worked out in between is kept."""
        return {}

    def _curvature(self, word: str) -> Curvature:
        if word not in self._curvatures:
            options: dict[str, Any] = {"by_share": self.damping_share is not None}
            if word == "gauss_newton":
                options = {"iterations": self.iterations, "tolerance": self.tolerance, "some": self.curvature is None}
            self._curvatures[word] = cast("Curvature", construct(word, BUILTIN, options, "producer.curvature"))
        return self._curvatures[word]

    def _fitting(self, setting: Setting, parameters: Parameters) -> str:
        """The curvature's word, where none is given."""
        if self.damping_share is not None:
            return "ekfac"
        exact = cast("GaussNewton", self._curvature("gauss_newton"))
        exact.load(setting.base, setting.task, parameters, setting.sample, {})
        if exact.kernel is None:
            say_first("curvature: ekfac, since fewer than 512 rows of the corpus could be inverted directly")
            return "ekfac"
        if exact.kernel.of < setting.sample.rows:
            say_first(
                f"curvature: {exact.kernel.of:,} rows of the sample's {setting.sample.rows:,}, all that there is room for"
            )
        return "gauss_newton"


def _solved(curvature: Curvature, damping: float, slope_QP: Tensor) -> Tensor:
    return curvature.solve(slope_QP, [damping])[0]


def _without_slope(query_id: str, length: float) -> NumericsError:
    hint = "the model is certain of it: no direction leads away" if length == 0 else "check its rows and the weights"
    return NumericsError(f"query {query_id!r}: its gradient has length {length}", hint)


def _warn_of_bends(steps: Mapping[str, Step]) -> None:
    """Say of how many queries the loss differences are not proportional to the step."""
    bent = {query_id: step for query_id, step in steps.items() if not step.error <= TOLERANCE}
    for query_id, step in list(bent.items())[:1]:
        say(
            f"warning: of {len(bent)} of {len(steps)} queries the loss differences are off by more than {TOLERANCE:.0%}: "
            f"first {query_id!r}, at a step of {step.rise_nats:g} nats, by {step.linear_error:.0%} from their exact "
            f"derivatives; half the step gives half of them to {step.half_step_difference:.0%}. Rounding, if short steps were "
            "tried too: a finer model.dtype or a higher task.temperature helps"
        )
