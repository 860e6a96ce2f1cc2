"""What a producer sees of the corpus, and what it finds out by that: once for a run, the same at every worker. Without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import kept_curvatures
from .artifacts import CHOICE, Run
from .errors import InputError
from .kept_curvatures import Kept
from .observe import say
from .sample import MAX_SHARDS, Drawn, draw_sample

if TYPE_CHECKING:
    from torch import nn

    from .model_check import ModelCheck
    from .producers.base import Fitted, SampleProducer, Setting
    from .tasks.base import Batch, Task

FEW_ROWS, MEASURED_ROWS = 4, 64
"""Rows of the corpus on which a producer measures what it may choose, at least and at most."""
MEASURING_S, MEASURING_PASSES = 3.0, 16
"""Seconds that measuring may take, about; a measurement costs as much as so many forward passes through its rows."""
SHARE_OF_TOKENS = 4
"""A curvature holds all logits of a batch of texts, and more: its batches are smaller than those that are scored, by so much.
Each costs as many numbers as all factors have, so they are full."""


@dataclass(frozen=True)
class CorpusView:
    """Random rows of a run's corpus.

    Args:
        run: The frozen run.
        task: Its task.
        base: Its base model.
        check: The base model's check: says what goes into one batch.
        tensors: Makes a batch's arrays tensors, where the base is.
    """

    run: Run
    task: Task
    base: nn.Module
    check: ModelCheck
    tensors: Callable[[Mapping[str, np.ndarray]], Batch]

    def chosen(self, producer: SampleProducer, seed: int) -> SampleProducer:
        """The producer with what its spec leaves open: chosen by the first start, for later ones and for replays."""
        import torch.distributed as dist

        from .curvatures.cost import timed
        from .producers.base import Ahead

        if not getattr(producer, "is_open", False):
            return producer
        run, several = self.run, dist.is_initialized() and dist.get_world_size() > 1
        found = [self._frozen_choice()]
        if found[0] is None and self._kept is not None and self._kept.fields:
            run.commit_measured(CHOICE, {"fields": self._kept.fields, "why": "kept with the curvature"})
            found = [self._frozen_choice()]
        if several:  # all see what the first one sees
            dist.broadcast_object_list(found)
        if found[0] is None:
            ahead = Ahead(len(run.query_ids), run.rows, run.spec.resources.score.actors or 1)
            few = self._some(seed, FEW_ROWS)
            few.losses()  # the first pass takes longer
            pass_s = few.sample.of_first(timed(few.losses)[1]) / few.sample.rows
            rows = min(int(MEASURING_S / (MEASURING_PASSES * pass_s)), MEASURED_ROWS)
            setting = self._some(seed, rows) if rows > few.sample.rows else few
            choice = cast(Any, producer).choose(setting, ahead)
            if not several or dist.get_rank() == 0:
                run.commit_measured(CHOICE, {"fields": dict(choice.fields), "why": choice.line})
                found = [self._frozen_choice()]
                if choice.line:
                    say(choice.line)
            if several:
                dist.broadcast_object_list(found)
        return cast("SampleProducer", replace(cast(Any, producer), **(found[0] or {})))

    def _some(self, seed: int, rows: int) -> Setting:
        """A few rows of one shard; of all, where none of those can be scored. Raises InputError: nor can any of these."""
        with suppress(InputError):
            return self.setting(seed, rows, most_shards=1)
        return self.setting(seed, MEASURED_ROWS)

    def setting(self, seed: int, rows: int, most_shards: int = MAX_SHARDS) -> Setting:
        """The sample as the producer sees it."""
        import torch.distributed as dist

        from .curvatures.base import Sample
        from .producers.base import Setting

        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        probe, rest, examples = self.drawn(rows, most_shards)
        numbers = range(len(probe) + len(rest))[rank::workers]
        sample = Sample([*probe, *rest][rank::workers], examples, numbers)
        return Setting(self.base, self.task, probe, sample, seed, self.run.spec.score.way in ("gradient", "jvp"))

    def drawn(self, rows: int, most_shards: int = MAX_SHARDS) -> tuple[list[Batch], list[Batch], int]:
        """Batches of some random rows of the corpus: of those of the probe, of the others; how many examples these are."""
        drawn = draw_sample(self.run, self.task, rows, most_shards)
        probe, rest = (self._batches(part) for part in drawn)
        return probe, rest, sum(len(part.example_id_N) for part in drawn)

    def _batches(self, drawn: Drawn) -> list[Batch]:
        """All of some examples, as the curvature takes them."""
        from .curvatures.rows import Rows

        section, inputs = self.run.spec.score, drawn.inputs
        return [
            Rows.of_items(self.tensors(batch.arrays), inputs, drawn.example_id_N, batch.item_B)
            for batch in self.check.batches(
                inputs, section.batch_rows, section.batch_tokens // SHARE_OF_TOKENS, full=True
            )
        ]

    def _frozen_choice(self) -> dict[str, Any] | None:
        """Fields that an earlier start, or the run that this one replays, chose."""
        return self.run.resolved.chosen.get("") or (self.run.measured(CHOICE) or {}).get("fields")

    @cached_property
    def _kept(self) -> Kept | None:
        """What another run fitted for this one, at the first worker."""
        import torch.distributed as dist

        place = kept_curvatures.place_of(self.run)
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        return kept_curvatures.read(place) if place is not None and is_first else None

    def fitted(self, producer: SampleProducer, setting: Setting) -> Fitted:
        """What the producer finds out about the corpus: once for a run, and for whatever is added to it."""
        import torch.distributed as dist
        from safetensors.torch import load, save

        from .producers.base import Fitted

        found = [self.run.fitted()]
        several = dist.is_initialized() and dist.get_world_size() > 1
        is_first = not several or dist.get_rank() == 0
        if several:  # all see what the first one sees
            dist.broadcast_object_list(found)
        kept_at, sample, losses = kept_curvatures.place_of(self.run), "", list[float]()
        if found[0] is None and kept_at is not None:
            sample, losses = kept_curvatures.sample_digest(setting.sample), setting.probe_losses()
            is_right = self._kept is not None and kept_curvatures.is_of(
                self._kept, self._frozen_choice() or {}, sample, losses
            )
            if (kept := setting.sample.of_first(self._kept if is_right else None)) is not None:
                found[0] = kept.tensors, kept.details
                if is_first:
                    say(f"curvature: as it was fitted before, in {kept_at}")
                    self.run.commit_fitted(kept.tensors, kept.details)
        if found[0] is not None:
            data, details = found[0]
            device = next(self.base.parameters()).device
            return Fitted({name: tensor.to(device) for name, tensor in load(data).items()}, details)
        fitted = producer.fit(setting)
        chosen = [fitted.details]
        if several:  # tensors are sums over all workers; what is chosen by them is the first one's choice
            dist.broadcast_object_list(chosen)
        if is_first:
            data = save({name: tensor.contiguous().cpu() for name, tensor in fitted.tensors.items()})
            self.run.commit_fitted(data, fitted.details)
            if kept_at is not None:
                kept_curvatures.write(
                    kept_at, Kept(self._frozen_choice() or {}, sample, losses, dict(fitted.details), data)
                )
        return Fitted(fitted.tensors, chosen[0])
