"""The judge: methods side by side, on whether their scores are right.

Reads: finished runs, scores of other tools, retrainings, what is known to be true.
Writes: {judge.uri}/report/: per judgement a table (CSV) and a figure; and these into each judged run's report/ too.
Resumes: made again as a whole; retrainings are kept.
Next: nothing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv

from . import storage, trials, truths
from .case import Judgement, Row, open_case
from .digests import with_absolute_uris
from .frozen import open_run
from .judge import Judge
from .retrain import Retrainings, fingerprint, retrain


def judged(judge: Judge) -> list[Judgement]:
    """Judge all methods by all that is asked, and write tables and figures.

    Raises:
        SpecError, InputError: Runs disagree, scores or truths are missing or strange.
        ArtifactError: A run is not finished, or damaged.
        NumericsError, ContractError, ClusterError: Of retrainings.
    """
    judge = _with_absolute_uris(judge)
    runs = {name: open_run(uri) for name, uri in judge.runs.items()}
    case = open_case(judge, runs)
    retrainings = Retrainings(judge, case.run, fingerprint(judge, case.run, case.examples))
    tried = trials.asked(case, retrainings)
    retrain(retrainings, [lesson for trial in tried for lesson in trial.lessons()])
    found = [trial.judgement() for trial in tried]
    found += [truths.truth(case)] if judge.truth else []
    found += [truths.mislabelled(case)] if judge.mislabelled else []
    for uri in (judge.judge.uri, *(run.uri() for run in runs.values())):
        for judgement in found:
            storage.write_bytes(f"{uri}/report/{judgement.name}.csv", _csv(judgement.rows))
            storage.write_bytes(f"{uri}/report/{judgement.name}.png", judgement.figure)
    return found


def _with_absolute_uris(judge: Judge) -> Judge:
    """It as workers in other folders understand it."""
    there = judge.judge.model_copy(update={"uri": storage.absolute(judge.judge.uri)})
    if judge.training.start is None:
        return judge.model_copy(update={"judge": there})
    start = with_absolute_uris("model", judge.training.start)
    return judge.model_copy(update={"judge": there, "training": judge.training.model_copy(update={"start": start})})


def _csv(rows: Sequence[Row]) -> bytes:
    out = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist(list(rows)), out)
    return out.getvalue()
