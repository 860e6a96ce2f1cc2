"""Last stage: what a person looks at.

Reads: topk/, queries.parquet, counterparts/*/meta.json.
Writes: report/contact_sheet.png (where examples are pictures), and report/index.html.
Resumes: made again as a whole.
Next: nothing; the run is sealed.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL.Image import Image

from . import noise
from .artifacts import Run
from .decode import decode_value
from .ensemble import number_of_members
from .folder import PAGE_COMMENT, with_digest_line
from .observe import printable, without_controls
from .picture import Strip, Tile, contact_sheet, picture_of, to_png
from .records import LOSSES, RANKED, Column
from .topk import described

SHEET_TILES = 8
"""Examples per side on the contact sheet; the page shows all."""
SHEET_QUERIES = 40
PAGE_QUERIES = 200
"""Beyond these a picture is too tall and a page too long to look at; the tables have all."""
TEXT_CHARS = 160
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem;border-top:1px solid #e5e7eb;padding-top:1.2rem}
p.facts,td.faint{color:#6b7280}table{border-collapse:collapse;width:100%;font-size:13px}h3{font-size:.95rem;margin:1rem 0 .3rem}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #f0f1f3;vertical-align:middle}
th{color:#6b7280;font-weight:500}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
img{image-rendering:pixelated;vertical-align:middle}img.sheet{max-width:100%;border:1px solid #e5e7eb;image-rendering:auto}
h3.proponent{color:#15803d}h3.opponent{color:#b91c1c}code{background:#f6f7f8;padding:.1rem .3rem;border-radius:3px}
p.warning{color:#b45309}
"""


def report(run: Run, ranking: tuple[pa.Table, dict[str, Any]] | None = None) -> None:
    """Draw the contact sheet and write the page.

    Args:
        run: The run.
        ranking: The ranked table and its meta.json; null for those in the run's folder.

    Raises:
        ArtifactError: The run is not ranked, or its ranking is damaged.
    """
    ranked, meta = ranking or run.read_ranked()
    image = picture_column(run, ranked)
    if image is not None:
        run.write(_sheet(run, ranked, meta, image), "report", "contact_sheet.png")
    run.write(page_bytes(_page(run, ranked, meta, image)), "report", "index.html")


def page_bytes(html: str) -> bytes:
    """A page as it is written: UTF-8, without the control characters of the texts that it shows, with its digest at the end."""
    return with_digest_line(without_controls(html), PAGE_COMMENT)


def picture_column(run: Run, ranked: pa.Table) -> Column | None:
    """The task's column that can be drawn, if the ranked table and the queries carry it."""
    for column in run.columns:
        if column.is_image and len(column.columns) == 1:
            name = column.columns[0]
            if name in ranked.schema.names and name in run.queries.schema.names:
                return column
    return None


def plain_payload(ranked: pa.Table) -> list[str]:
    """Payload columns that read well in a table cell: numbers and text."""
    fields = list(ranked.schema)[len(RANKED) :]
    return [field.name for field in fields if not (pa.types.is_nested(field.type) or pa.types.is_binary(field.type))]


def number_columns(names: Iterable[str]) -> list[str]:
    """What of a ranked row is a number to look at: value, score and losses, by the names they are stored under."""
    return [name for name in names if name in ("value", "score") or name.startswith(LOSSES)]


def of(ranked: pa.Table, query_id: str, side: str) -> list[dict[str, Any]]:
    """One query's ranked rows on one side, strongest first."""
    return ranked.filter(pc.and_(pc.equal(ranked["query_id"], query_id), pc.equal(ranked["side"], side))).to_pylist()


def _sheet(run: Run, ranked: pa.Table, meta: dict[str, Any], image: Column) -> bytes:
    plain = plain_payload(ranked)

    def tile(row: dict[str, Any]) -> Tile:
        facts = " ".join(f"{column} {row[column]}" for column in plain)
        return Tile(_picture(row, image), (f"{row['value']:+.3g}", printable(facts)))

    strips = []
    for query_id in run.query_ids[:SHEET_QUERIES]:
        rows, tuned = query_rows(run, query_id), run.counterpart_meta(query_id)
        lines = [query_id, *(f"{column} {rows[0][column]}" for column in plain if column in rows[0])]
        if tuned["query_rows"]:
            lines += [f"loss {tuned['query_loss_before_nats']:.3g}", f"to {tuned['query_loss_after_nats']:.3g}"]
        lines += [f"{len(rows)} rows"] if len(rows) > 1 else []
        query = Tile(_picture(rows[0], image), tuple(map(printable, lines)))
        sides = [[tile(row) for row in of(ranked, query_id, side)[:SHEET_TILES]] for side in ("proponent", "opponent")]
        strips.append(Strip(query, *sides))
    return contact_sheet(printable(f"{title(run)}: which training examples made the model do that?"), strips)


def query_rows(run: Run, query_id: str) -> list[dict[str, Any]]:
    """A query's rows with all their columns."""
    return run.queries.filter(pc.equal(run.queries["query_id"], query_id)).to_pylist()


def title(run: Run) -> str:
    """The run's folder name."""
    return run.uri().rstrip("/").rsplit("/", 1)[-1]


def _page(run: Run, ranked: pa.Table, meta: dict[str, Any], image: Column | None) -> str:
    facts = [
        f"{meta['examples']:,} training examples scored, {meta['rejects']:,} rejected",
        f"{len(run.query_ids)} queries",
        f"producer {run.spec.producer.implementation}",
        f"ranked by {described(meta['transform'])}, {meta['k']} per side",
        f"seed {run.spec.seed}",
        *([f"mean of {number_of_members(run)} models"] if number_of_members(run) else []),
    ]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title(run))}</title><style>{STYLE}</style>",
        f"<h1>{escape(title(run))}</h1><p class=facts>{escape(' · '.join(facts))}</p>",
        "<p>Proponents are training examples that the query's loss depends on for the better; opponents, for the worse. "
        "Losses are in nats; the score is the change of an example's loss between the base model and the query's "
        "counterpart, signed so that higher means more helpful.</p>",
    ]
    if said := noise.lines(run, meta):
        parts.append(f"<p{' class=warning' * (len(said) > 1)}>{'<br>'.join(map(escape, said))}</p>")
    if image is not None:
        parts.append("<p><img class=sheet src=contact_sheet.png alt='contact sheet of all queries'></p>")
    shown = run.query_ids[:PAGE_QUERIES]
    if len(shown) < len(run.query_ids):
        parts.append(f"<p>The first {len(shown)} of {len(run.query_ids):,} queries; topk/ranked.parquet has all.</p>")
    parts += [_query_section(run, ranked, query_id, image) for query_id in shown]
    return "\n".join(parts) + "\n</html>\n"


def _query_section(run: Run, ranked: pa.Table, query_id: str, image: Column | None) -> str:
    rows, tuned, plain = query_rows(run, query_id), run.counterpart_meta(query_id), plain_payload(ranked)
    facts = []
    if tuned["query_rows"]:
        facts.append(f"{len(rows)} row{'s' * (len(rows) > 1)}")
        facts += [f"{name} {_text(rows[0][name])}" for name in plain if name in rows[0]]
        facts.append(
            f"loss {tuned['query_loss_before_nats']:.4g} → {tuned['query_loss_after_nats']:.4g} nats in {tuned['steps']} steps"
        )
    facts += [f"{name} {value}" for name, value in tuned["details"].items()]
    facts.append(f"weights moved by {tuned['change_norm']:.3g}")
    parts = [f"<h2>{escape(query_id)}</h2><p>{_thumb(rows[0], image)} <span>{escape(' · '.join(facts))}</span></p>"]
    for side in ("proponent", "opponent"):
        if listed := of(ranked, query_id, side):
            parts.append(f"<h3 class={side}>{side.capitalize()}s</h3>{_table(listed, plain, image)}")
    return "\n".join(parts)


def _table(rows: Sequence[dict[str, Any]], plain: Sequence[str], image: Column | None) -> str:
    numbers: dict[str, Callable[[Any], str]] = {name: lambda value: f"{value:.4g}" for name in number_columns(rows[0])}
    names = ["rank", "example_id", *(["source"] if rows[0]["source"] is not None else []), *plain, *numbers]
    head = "".join(f"<th{' class=n' * (name in numbers)}>{escape(name)}" for name in names)
    body = []
    for row in rows:
        cells = [
            f"<td class=n>{numbers[name](row[name])}" if name in numbers else f"<td>{escape(_text(row[name]))}"
            for name in names
        ]
        body.append(f"<tr>{f'<td>{_thumb(row, image)}' if image else ''}{''.join(cells)}")
    return f"<table><tr>{'<th>' if image else ''}{head}{''.join(body)}</table>"


def _thumb(row: dict[str, Any], image: Column | None) -> str:
    if image is None:
        return ""
    return (
        f'<img height=42 alt="" src="data:image/png;base64,{base64.b64encode(to_png(_picture(row, image))).decode()}">'
    )


def _picture(row: dict[str, Any], image: Column) -> Image:
    return picture_of(decode_value(row[image.columns[0]], image).reshape(image.shape))


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= TEXT_CHARS else text[:TEXT_CHARS] + "…"
