"""For people: ranked texts with each token shaded by the change of its loss, as a page.

Reads: topk/, counterparts/, corpus files, the model.
Writes: report/tokens-QUERY.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from .artifacts import Run
from .batches import own_copy
from .corpus import Corpus
from .decode import decode
from .digests import as_frozen
from .errors import InputError, SpecError
from .extensions import load_model, load_task, prepared
from .importing import user_code
from .report import STYLE, of, page_bytes

if TYPE_CHECKING:
    from .tasks.base import SequenceTask

SHADES = """
.text{line-height:2;white-space:pre-wrap;overflow-wrap:anywhere;border-bottom:1px solid #f0f1f3;padding:.4rem 0}
.text span{padding:.15rem 0;border-radius:2px}.legend span{padding:.1rem .5rem;border-radius:3px}
"""
STRONGEST = 0.75
"""Opacity of the token that changed most."""


@dataclass(frozen=True)
class Shaded:
    """One text's tokens.

    Args:
        tokens: As text.
        base_T: Loss of each under the base model, in nats.
        score_T: Its change, signed as scores are.
    """

    tokens: list[str]
    base_T: np.ndarray
    score_T: np.ndarray


def shade(run: Run, query_id: str, top: int) -> str:
    """Write the page of a query's strongest texts on each side; its URI.

    Raises:
        SpecError: The run's task is no language task.
        ArtifactError, InputError: The run is not ranked, or the corpus changed.
    """
    ranked, _ = run.read_ranked()
    rows = {side: of(ranked, query_id, side)[:top] for side in ("proponent", "opponent")}
    every = [row for side in rows.values() for row in side]
    texts = _shaded(run, query_id, every)
    strongest = max((float(np.abs(text.score_T).max(initial=0)) for text in texts), default=0.0) or 1.0
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(query_id)}</title><style>{STYLE}{SHADES}</style>",
        f"<h1>{escape(query_id)}</h1><p class=legend>Each token by how much it scores: <span style='{_style(1, 1)}'>"
        f"+{strongest:.3g} nats</span> its loss moved with the query, <span style='{_style(-1, 1)}'>-{strongest:.3g} nats</span> "
        "against it. Point at a token for its figures.</p>",
    ]
    following = iter(texts)
    for side, some in rows.items():
        parts.append(f"<h3 class={side}>{side.capitalize()}s</h3>" if some else "")
        parts += [_text(row, next(following), strongest) for row in some]
    path = f"tokens-{quote(query_id, safe='')}.html"
    run.write(page_bytes("\n".join(parts) + "\n</html>\n"), "report", path)
    return run.uri("report", path)


def _shaded(run: Run, query_id: str, rows: list[dict[str, Any]]) -> list[Shaded]:
    """The tokens of some ranked rows, with their losses under base and counterpart."""
    from .changes import from_bytes
    from .engine import LossEngine

    with as_frozen(run):
        task: Any = load_task(run.spec.task)
        if not hasattr(task, "token_losses_BT"):
            raise SpecError(f"task {run.spec.task.implementation} has no tokens", "only texts can be shaded")
        model = load_model(run.spec.model, "cpu", run.spec.seed)
    engine = LossEngine(model, task, [from_bytes(run.counterpart_tensors(query_id))])
    direction = run.counterpart_meta(query_id)["direction"]
    corpus = Corpus(run.spec.corpus)
    with as_frozen(run), user_code(f"task {run.spec.task.implementation}"):
        return [_one(engine, task, direction, _inputs(run, corpus, task, row)) for row in rows]


def _inputs(run: Run, corpus: Corpus, task: SequenceTask, row: dict[str, Any]) -> dict[str, np.ndarray]:
    """A ranked row as the model takes it: all its windows in one batch."""
    names = list(dict.fromkeys(name for column in run.columns for name in column.columns))
    table = corpus.payload(run.shards[row["shard_id"]], [row["row"]], names)
    arrays, good_N, _ = decode(table, np.array([row["row"]]), run.columns)
    if not good_N.all():
        raise InputError(f"{row['example_id']} cannot be read any more", "did the corpus change?")
    return dict(prepared(task, arrays).whole())


def _one(engine: Any, task: Any, direction: int, arrays: dict[str, np.ndarray]) -> Shaded:
    import torch

    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    id_BT = task.token_ids_BT(batch)
    with torch.inference_mode():
        base_BT = task.token_losses_BT(engine.model, own_copy(batch))
        with engine.counterpart(0) as counterpart:
            changed_BT = task.token_losses_BT(counterpart, own_copy(batch))
    counted_BT = id_BT >= 0
    score_BT = direction * (changed_BT.double() - base_BT.double())
    base_T, score_T = (values[counted_BT].double().numpy() for values in (base_BT, score_BT))
    return Shaded(task.token_texts(id_BT[counted_BT].tolist()), base_T, score_T)


def _text(row: dict[str, Any], text: Shaded, strongest: float) -> str:
    spans = [
        f"<span style='{_style(score, abs(score) / strongest)}' title='base {base:.3g}, change {score:+.3g} nats'>"
        f"{escape(token)}</span>"
        for token, base, score in zip(text.tokens, text.base_T, text.score_T, strict=True)
    ]
    facts = f"{row['rank']}. <code>{escape(row['example_id'])}</code> value {row['value']:.4g}"
    return f"<p class=facts>{facts}</p><div class=text>{''.join(spans)}</div>"


def _style(sign: float, strength: float) -> str:
    color = "22,163,74" if sign > 0 else "220,38,38"
    return f"background:rgba({color},{STRONGEST * strength:.2f})"
