"""What a run of `jobs/specs/trace_facts.yaml` found, to read: `python -m jobs.traced RUN_URI --before MODEL`.

Each question with the answer of the model before and after it was tuned, and the sentences that rank first; those that state the
fact are marked.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline.frozen import open_run
from pipeline.report import of

from . import cli
from .cli import RunArgument
from .display import console, show_place

SENTENCES, ANSWER_TOKENS = 5, 8


def answers(folder: str, prompts: list[str]) -> list[str]:
    """What a model goes on with, greedily, up to the end of the sentence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, trust_remote_code=False
    )
    found = []
    for prompt in prompts:
        asked = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            **asked, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        text = tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(text.strip().split("\n")[0])
    return found


def show(run_uri: str, before: str) -> None:
    """Print questions, answers and sentences. Raises ArtifactError if the run is not ranked."""
    run = open_run(run_uri)
    ranked, _ = run.read_ranked()
    questions: list[dict[str, Any]] = run.queries.to_pylist()
    prompts = [question["prompt"] for question in questions]
    out = console()
    after = answers(run.spec.model.weights_uri or "", prompts)
    for question, old, new in zip(questions, answers(before, prompts), after, strict=True):
        out.print(f"\n{question['prompt']} ...", style="bold")
        out.print(f"  before  {old!r}\n  after   {new!r}")
        table = Table("rank", "score", "sentence", "states the fact", box=None, padding=(0, 2))
        for row in of(ranked, question["query_id"], "proponent")[:SENTENCES]:
            table.add_row(
                str(row["rank"]),
                f"{row['score']:+.3f}",
                row["text"],
                "yes" if row["fact"] == question["query_id"] else "",
            )
        out.print(table)
    show_place("\npage", run.uri("report", "index.html"))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    run_uri: RunArgument,
    before: Annotated[str, typer.Option(metavar="FOLDER", help="The model before it was tuned.")],
) -> None:
    """Command line."""
    show(run_uri, before)


if __name__ == "__main__":
    cli.main(app)
