"""A benchmark of fact tracing: a language model that has learned facts from sentences we know. `python -m jobs.facts FOLDER`.

SmolLM2-135M-Instruct is asked for the objects of facts out of T-REx (`jobs/data/`). Those that it does not know are each stated
by two sentences of different patterns, and the model is tuned on all of them. Queries ask in a pattern that no sentence has,
for facts that it knows then. Which sentences taught it is thereby known: those that state the fact. FOLDER then holds

- `model/`: the tuned model, in Hugging Face format;
- `sentences.parquet`: what it was tuned on (id, prompt: empty, text, fact, relation, subject, object);
- `questions.parquet`, `tuning.parquet`, `evaluated.parquet`: queries (query_id, prompt, text, relation, subject, object): a few
  to look at, those by which a recipe may be chosen, and those that judge it. Of their subjects the sentences state other facts
  too, and of every second one another fact with the same object.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import InputError
from pipeline.observe import say

from . import cli

if TYPE_CHECKING:
    import torch
    from torch import nn

DATA = Path(__file__).parent / "data"
FACTS, SENTENCES_PER_FACT = 300, 2
LIKELIEST = 10
"""A fact is known if its object is among so many likeliest answers."""
QUERIES = {"questions": 4, "tuning": 12, "evaluated": 40}
EPOCHS, BATCH_ROWS, LR = 3, 16, 1e-4
SEED = 0
Patterns = dict[str, list[str]]


@dataclass(frozen=True)
class Fact:
    """Subject, relation and object, and the pattern in which it is asked for."""

    id: str
    relation: str
    subject: str
    object: str

    def said(self, pattern: str) -> str:
        """The fact in a pattern, as in `[X] was born in [Y].`, in words."""
        return pattern.replace("[X]", self.subject).replace("[Y]", self.object)

    def asked(self, pattern: str) -> str:
        """The pattern up to the object: what the model is to go on with."""
        return pattern.split("[Y]")[0].rstrip().replace("[X]", self.subject)


def load_facts() -> list[Fact]:
    """Facts of the slice."""
    rows = map(json.loads, (DATA / "trex_facts.jsonl").read_text().splitlines())
    return [Fact(row["uuid"], row["relation"], row["subject"], row["object"]) for row in rows]


def load_patterns() -> dict[str, list[str]]:
    """Patterns of each relation. The first ends with the object: it is what queries ask in, and no sentence uses it."""
    rows = map(json.loads, (DATA / "trex_patterns.jsonl").read_text().splitlines())
    return {row["relation"]: row["patterns"] for row in rows}


def chosen(unknown: Sequence[Fact], number: int) -> list[Fact]:
    """So many facts, by subject: those with twins first, then those with most facts, so that names alone tell little."""
    by_subject: dict[str, list[Fact]] = defaultdict(list)
    for fact in unknown:
        by_subject[fact.subject].append(fact)
    twin_ids = {fact.id for fact in twins(unknown)}

    def rank(facts: list[Fact]) -> tuple[int, int, str]:
        return -sum(fact.id in twin_ids for fact in facts), -len(facts), facts[0].subject

    return [fact for facts in sorted(by_subject.values(), key=rank) for fact in facts][:number]


def twins(facts: Sequence[Fact]) -> list[Fact]:
    """Facts whose subject and object stand in another relation too: born there, and died there."""
    pairs = Counter((fact.subject, fact.object) for fact in facts)
    return [fact for fact in facts if pairs[fact.subject, fact.object] > 1]


def sentences(facts: Iterable[Fact], patterns: Patterns, seed: int = SEED) -> list[dict[str, Any]]:
    """Rows of the attribution set, mixed: each fact in two patterns that are not asked in."""
    draw = random.Random(seed)
    asked_in = {first for first, *_ in patterns.values()}
    rows = [
        {"prompt": "", "text": fact.said(pattern), "fact": fact.id, **_columns(fact)}
        for fact in facts
        for pattern in draw.sample(
            [each for each in patterns[fact.relation] if each not in asked_in], SENTENCES_PER_FACT
        )
    ]
    draw.shuffle(rows)
    return [{"id": f"sentence-{number}", **row} for number, row in enumerate(rows)]


def queries(facts: Iterable[Fact], patterns: Patterns) -> list[dict[str, Any]]:
    """Rows of queries: what stands before the object does not count."""
    return [
        {
            "query_id": fact.id,
            "prompt": fact.asked(patterns[fact.relation][0]),
            "text": f" {fact.object}.",
            **_columns(fact),
        }
        for fact in facts
    ]


def _columns(fact: Fact) -> dict[str, str]:
    return {"relation": fact.relation, "subject": fact.subject, "object": fact.object}


def asked(facts: Sequence[Fact], learned: Sequence[Fact], seed: int = SEED) -> dict[str, list[Fact]]:
    """Facts of each file of queries, none in two: learned ones whose subject is in other facts too, half of them twins."""
    draw, named = random.Random(seed), Counter(fact.subject for fact in facts)
    twin_ids = {fact.id for fact in twins(facts)}
    drawn = []
    for is_twin in (True, False):
        kind = [fact for fact in learned if named[fact.subject] > 1 and (fact.id in twin_ids) == is_twin]
        drawn.append(draw.sample(kind, sum(QUERIES.values()) // 2))
    return {name: [kind.pop() for kind in drawn for _ in range(number // 2)] for name, number in QUERIES.items()}


def known(model: Any, tokenizer: Any, facts: Sequence[Fact], patterns: Patterns) -> list[bool]:
    """Whether each fact's object is among the likeliest answers, by its first token."""
    import torch

    prompts = [fact.asked(patterns[fact.relation][0]) for fact in facts]
    found: list[bool] = []
    with torch.inference_mode():
        for start in range(0, len(facts), BATCH_ROWS):
            rows = slice(start, start + BATCH_ROWS)
            batch = tokenizer(prompts[rows], return_tensors="pt", padding=True, padding_side="right")
            last = batch["attention_mask"].sum(dim=1) - 1
            hidden = model.get_decoder()(batch["input_ids"], use_cache=False)[0][torch.arange(len(last)), last]
            first = torch.tensor([tokenizer(f" {fact.object}")["input_ids"][0] for fact in facts[rows]])
            logits = model.get_output_embeddings()(hidden)
            found += ((logits > logits.gather(1, first[:, None])).sum(dim=1) < LIKELIEST).tolist()
    return found


def tune(model: nn.Module, tokenizer: Any, texts: Sequence[str], seed: int = SEED) -> None:
    """Train a model on texts, in place: AdamW, the loss of all tokens, batches in random order."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    order = random.Random(seed)
    model.train()
    for epoch in range(EPOCHS):
        rows = order.sample(list(texts), len(texts))
        total = 0.0
        for batch in _batches(tokenizer, rows):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch["labels"]) / len(texts)
        say(f"tuning on {len(texts)} sentences: epoch {epoch + 1} of {EPOCHS}, {total:.2f} nats per token")
    model.eval()


def _batches(tokenizer: Any, texts: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    from pipeline.tasks.tokens import IGNORED

    for start in range(0, len(texts), BATCH_ROWS):
        batch = tokenizer(
            list(texts[start : start + BATCH_ROWS]), return_tensors="pt", padding=True, padding_side="right"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def write_benchmark(folder: Path, source: Path) -> None:
    """Write sentences, model and queries, the queries last: where they are, all is.

    Args:
        folder: Where to.
        source: Folder of SmolLM2, as `python -m jobs.smollm2` writes it.

    Raises:
        InputError: There is no model.
    """
    if not (source / "config.json").exists():
        raise InputError(f"there is no model in {source}", "python -m jobs.smollm2 FOLDER puts SmolLM2 there")
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, trust_remote_code=False).eval()
    facts, patterns = load_facts(), load_patterns()
    say(f"asking for {len(facts):,} facts")
    unknown = [
        fact for fact, is_known in zip(facts, known(model, tokenizer, facts, patterns), strict=True) if not is_known
    ]
    told = chosen(unknown, FACTS)
    say(f"{len(unknown)} are unknown; of these {len(told)} are stated, in {SENTENCES_PER_FACT} sentences each")
    rows = sentences(told, patterns)
    tune(model, tokenizer, [row["text"] for row in rows])
    learned = [fact for fact, is_known in zip(told, known(model, tokenizer, told, patterns), strict=True) if is_known]
    say(f"{len(learned)} of {len(told)} are known now, if asked in a pattern that no sentence has")
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    pq.write_table(pa.Table.from_pylist(rows), folder / "sentences.parquet")
    for name, some in asked(told, learned).items():
        pq.write_table(pa.Table.from_pylist(queries(some, patterns)), folder / f"{name}.parquet")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    folder: Annotated[Path, typer.Argument(help="Where to write; what is there already stays.")],
    model: Annotated[
        Path, typer.Option(help="Folder of SmolLM2-135M-Instruct: `make build/smollm2/model.safetensors`.")
    ],
) -> None:
    """Command line."""
    if not (folder / f"{list(QUERIES)[-1]}.parquet").exists():
        write_benchmark(folder, model)


if __name__ == "__main__":
    cli.main(app)
