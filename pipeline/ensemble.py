"""An ensemble: a run whose scores are the mean of those of its members, runs of their own in its folder.

What is asked of a run's counterparts an ensemble answers from its members'; in all else it is a run like any other.

Shapes: M members.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .artifacts import Run, counterparts_digest
from .errors import ArtifactError, SpecError
from .folder import parallel
from .spec import Spec

FOLDER = "members"
"""In the ensemble's folder: one folder per member."""


@dataclass(frozen=True)
class Ensemble(Run):
    """An opened ensemble.

    Args:
        members: Its members' runs in order, as far as they are frozen: all of them, but for a start that broke off early.
    """

    members: tuple[Run, ...] = ()

    def named(self, place: int) -> str:
        """A member, for people."""
        return f"member {place + 1} of {number_of_members(self)} ({member_name(place)})"

    def committed_queries(self) -> set[str]:
        """Queries whose counterpart is committed in every member."""
        if len(self.members) < number_of_members(self):
            return set()
        return set.intersection(*parallel(lambda member: member.committed_queries(), self.members))

    def counterpart_meta(self, query_id: str) -> dict[str, Any]:
        """What the members say of a query's counterparts, together.

        Losses and the change's norm are means by weight. `shares` are the members' parts in the score, 1 together: proportional
        to weight / scale, as scores are proportional to scale. `tensors` has a digest of all that the mean is made of.

        Raises:
            InputError, ArtifactError: A member's counterpart is missing or damaged, or they do not go together.
        """
        if len(self.members) < number_of_members(self):
            raise ArtifactError(f"{self.uri()}: {len(self.members)} of {number_of_members(self)} members are begun")
        metas = parallel(lambda member: member.counterpart_meta(query_id), self.members)
        directions = [meta["direction"] for meta in metas]
        if len(set(directions)) > 1:
            raise ArtifactError(f"{self.uri()}: query {query_id!r}: members score in directions {directions}")
        scales_M = np.array([scale_of(meta) for meta in metas])
        weight_M = np.array([1.0, *(member.weight for member in self.spec.ensemble)])
        part_M = weight_M / scales_M
        shares = (part_M / part_M.sum()).tolist()
        digests = [
            f"{meta['tensors']['sha256']} {scale!r}" for meta, scale in zip(metas, scales_M.tolist(), strict=True)
        ]
        means = ("query_loss_before_nats", "query_loss_after_nats", "change_norm")
        return {
            "direction": directions[0],
            "query_id": query_id,
            "query_rows": metas[0]["query_rows"],
            "steps": max(meta["steps"] for meta in metas),
            **{name: _mean([meta[name] for meta in metas], weight_M) for name in means},
            "details": {"members": len(metas), "shares": " ".join(f"{share:.3g}" for share in shares)},
            "weights": (weight_M / weight_M.sum()).tolist(),
            "shares": shares,
            "tensors": {"sha256": counterparts_digest(digests)},
        }

    def counterpart_tensors(self, query_id: str) -> bytes:
        """There are none. Raises SpecError."""
        raise SpecError(
            f"{self.uri()} is an ensemble: it has no counterpart of its own",
            f"ask one of its members: {self.uri(member_name(0))}",
        )


def member_name(place: int) -> str:
    """Folder of a member in that of its ensemble."""
    return f"{FOLDER}/{place:02d}"


def members_of(run: Run) -> tuple[Run, ...]:
    """The members of an ensemble; none of an ordinary run."""
    return run.members if isinstance(run, Ensemble) else ()


def ensemble_of(run: Run, members: tuple[Run, ...] = ()) -> Ensemble:
    """A run that is one, as one."""
    return Ensemble(**{each.name: getattr(run, each.name) for each in fields(Run)}, members=members)


def number_of_members(run: Run) -> int:
    """How many members there are to be, the run's own model included; 0 of an ordinary run."""
    return 1 + len(run.spec.ensemble) if run.spec.ensemble else 0


def member_spec(spec: Spec, place: int) -> Spec:
    """The spec of one member of an ensemble: that of an ordinary run, not resolved."""
    uris = [getattr(spec.model, "weights_uri", None), *(member.weights_uri for member in spec.ensemble)]
    run = spec.run.model_copy(update={"uri": f"{spec.run.uri}/{member_name(place)}"})
    model = spec.model.model_copy(update={"weights_uri": uris[place]})
    return spec.model_copy(update={"run": run, "model": model, "ensemble": [], "resolved": None})


def scale_of(meta: dict[str, Any]) -> float:
    """What the scores of a counterpart are proportional to."""
    return float(meta.get("scale", 1.0))


def _mean(values: list[float | None], weight_M: np.ndarray) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.average(known, weights=weight_M)) if len(known) == len(values) else None
