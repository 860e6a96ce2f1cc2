"""The run as one frozen typed tree: YAML in, pydantic out, every problem reported at once with its path.

The string under a field says its meaning, its unit and why this default. Environment variables carry credentials and
endpoints only; they never appear here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .choices import ModelSection, ProducerSection, TaskSection
from .producer_choices import Reference, Unlearn
from .records import Transform
from .sections import Section, Uri

LANGUAGE_TASKS = ("causal_lm", "seq2seq")
FACTORED = {"curvature": "ekfac", "damping_share": 0.1}
"""Of `natural` for language models, where nothing else is given."""
TEMPERATURE, RELEASED_TEMPERATURE = 2.0, 1.0
"""Of classification where none is given: what was judged best, and that of the released recipe."""
_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]


class RunSection(Section):
    """Where the run lives."""

    uri: Uri
    """Folder of the run: a local path or any URI that fsspec opens. One spec, one folder."""


class Member(Section):
    """A further model of an ensemble: of the kind of `model`, with weights of its own."""

    weights_uri: Uri
    """As `model.weights_uri`: another training of the same model, or another checkpoint of it. All else is `model`'s. A glob,
    such as checkpoints/step-*.safetensors (or checkpoint-*, where the model is a folder), is a member for each model that it
    matches when the run is frozen, in natural order; weights that are members already are left out. Later checkpoints change
    nothing. A path that exists is that path, whatever characters are in it."""
    weight: _Positive = 1.0
    """Its part in the mean (of a glob, that of each of its models), where that of `model` is 1. Scores of a producer that chooses
    its step are divided by it first."""

    @model_validator(mode="before")
    @classmethod
    def _by_its_weights(cls, data: Any) -> Any:
        """A bare URI is a member of weight 1."""
        return {"weights_uri": data} if isinstance(data, str) else data


class CorpusSection(Section):
    """The training examples."""

    uri: Uri
    """A file, a folder (searched to the bottom) or a glob. A path that exists is that path, whatever characters are in it."""
    format: Literal["auto", "parquet", "jsonl", "csv", "image_folder"] = "auto"
    """`auto` goes by the files' suffixes; JSON lines and CSV may be compressed (.gz, .bz2, .zst). An image folder has one
    sub-folder of images per class."""
    example_id: str | None = None
    """Column of unique ids. Bytes are the text that they spell in UTF-8, else hexadecimal digits, as bytes of fixed size always
    are. Null: made from the file's path below `uri` and the row in it."""
    source: str | None = None
    """Column that groups examples, for the per-source tables; or the key of folders called `key=value`."""
    payload: list[str] | None = None
    """Columns to carry into the ranked table. Null: those the task reads. They are fetched for ranked rows only."""
    classes: list[str] | None = None
    """Image folders: the sub-folders, in label order. Null: all of them sorted by name, empty ones too, as torchvision has it."""
    check_ids: bool = True
    """Whether to read the id column once, before any work, to see that no id comes twice."""


class QueriesSection(Section):
    """What is asked about: rows with the corpus's columns, and a query id."""

    uri: Uri
    """A file, a folder (searched to the bottom) or a glob."""
    format: Literal["auto", "parquet", "jsonl", "csv", "image_folder"] = "auto"
    """As for the corpus."""
    query_id: str | None = None
    """Column whose equal values make one query. Null: `query_id`, or in an image folder every image is a query."""


class ScoreSection(Section):
    """How the corpus is cut up and run through the models."""

    shard_rows: _Count | None = None
    """Rows per shard, the unit of work and of loss. Null: a 32nd of the corpus in whole batches, at most 65,536 rows and
    256 MiB decoded. Aim at a minute of one accelerator per shard and query."""
    batch_rows: _Count = 256
    """Rows per forward pass. Every batch has exactly this shape (the last is filled up), which makes scores the same to
    the bit under any shard size and worker count; see pipeline/decisions/. Texts go by `batch_tokens` instead."""
    batch_tokens: _Count = 4096
    """Tokens per forward pass of texts, padding included. Texts are sorted by length within a shard, so little is padding."""
    way: Literal["auto", "difference", "gradient", "jvp"] = "auto"
    """How a score is made. `difference`: of two losses, a pass for each query; it serves any counterpart. `gradient`: what a
    loss changes by to first order, from one backward pass for all queries; for short steps, as `natural` takes them. `jvp`: the
    same by forward differentiation, two to three passes for each query; for steps that drown in a loss's rounding. `auto`: from
    16 queries on `gradient`, where a calibration finds it 1.5 times as fast, and loss differences within 10 % of it; else
    `difference`."""
    compile: bool = False
    """Whether loss differences are made with the model's blocks as torch.compile makes them: about 1.15 times as fast on a CPU
    where all parameters are tuned, once every actor has compiled for 3 to 20 s. It needs a C++ compiler where actors run; a model
    without blocks, or that cannot be compiled, or whose losses are then others, is scored as it is, which is said. Of a run of
    more than a minute `plan --calibrate` tries out what it would save."""
    base_losses: Uri | None = None
    """Folder, outside of any run's, in which losses under the base model are kept: every run of the same model, task, batches
    and shards that names it reads there what one before it wrote, and leaves that forward pass out. Null: not kept."""
    noise_rows: Annotated[int, Field(ge=0)] = 16
    """Rows of a shard that are scored once more in a finer precision than the model's, to know the noise that rounding leaves in
    scores: of shards 0, 1, 4, 16, ..., an eighth of each, 8 rows to this many. Takes memory for a finer copy of the model, and is
    left out, aloud, where that is not there. 0: not measured."""
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the corpus that may end in rejects/ before the run stops. 0: the first bad row stops it, and the same
    command with a higher value goes on from there."""

    @model_validator(mode="after")
    def _compiles_differences(self) -> ScoreSection:
        if self.compile and self.way in ("gradient", "jvp"):
            raise ValueError(f"compile goes with way difference: way {self.way} runs the model as it is")
        return self


class RankSection(Section):
    """What is listed; changes here never score again."""

    k: _Count = 10
    """Proponents, and opponents, per query."""
    transform: Transform = "signed"
    """`signed` ranks by score; `absolute` by its size (the paper's, which has no opponents); `relative` by
    score / (base_loss + eps), which finds near-copies best; `counterpart_loss` by minus the loss under the counterpart, whatever
    it was under the base: the opponents are what a model fine-tuned on clean rows finds hardest, such as wrong labels. It wants
    a producer whose query's loss falls (`finetune`, `reference`)."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Also write topk/selected/: this share of the examples of every source, those of highest value, as filters keep them. Null:
    no such table."""
    eps: _Positive = 1e-3
    """Added to the base loss by `relative`, in nats."""


class TuneResources(Section):
    """Ray Train workers; queries are shared out over them."""

    workers: _Count = 1
    """Workers; more than queries are not started."""
    cpus: _Positive | None = None
    """CPUs of each, and torch threads (rounded down, at least one). Null: with one worker and no GPU all of the largest machine
    but one, up to 16; else one."""
    gpus: _NotNegative = 0.0
    """GPUs of each."""
    shard: bool = False
    """Whether all workers tune each query together, each holding its share of the counterpart (FSDP2): for models of which one
    worker cannot hold a copy with gradients. The base is then held in CPU memory."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that the worker group is started again after a worker died."""


class ScoreResources(Section):
    """Ray Data actors; each holds the base model and counterparts."""

    actors: _Count | None = None
    """Actors. Null: as many as the cluster has room for, leaving one CPU to Ray, and no more than shards."""
    cpus: _Positive = 1.0
    """CPUs of each, and torch threads (rounded down, at least one)."""
    gpus: _NotNegative = 0.0
    """GPUs of each."""
    counterparts_gib: _Positive | None = None
    """Memory of each for counterparts, in GiB, on its GPU if it has one. Those beyond wait in the host's memory, or in files on
    its disk, for further passes over the shard. Null: half of what the GPU has free, or of the host's by share of its CPUs."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that a shard is tried again after its actor died or stalled on it; then it is quarantined, and the others go on."""
    stalled_after_s: _Positive | None = None
    """Seconds on one shard after which its actor is ended and the shard tried again. Null: 10 times the slowest shard of this
    start, at least 1800; before one has finished, never."""


class ResourcesSection(Section):
    """What the run asks of Ray; no part of the run's identity."""

    address: str | None = None
    """Ray cluster: `auto`, `host:port` or `ray://...`. Null: RAY_ADDRESS if set, else an embedded Ray on this machine."""
    tune: TuneResources = TuneResources()
    """For stage tune."""
    score: ScoreResources = ScoreResources()
    """For stage score."""


class Resolved(Section):
    """What a run was frozen with; the pipeline writes it. A spec that carries it is refused when its inputs differ."""

    fingerprint: str
    """Digest of all that decides the scores."""
    digests: dict[str, str]
    """sha256 of the contents of `weights` and `queries`, and of the names, sizes and rows (not the contents) of the `corpus`."""
    files: dict[str, dict[str, str]] = {}
    """sha256 of each file behind the digest of a model, a tokenizer or an adapter; of a single file, with an empty name. Whatever
    loads one compares it."""
    found: dict[str, list[str]] = {}
    """Glob in `ensemble` -> the weights that it found when the run was frozen; later starts take these."""
    chosen: dict[str, dict[str, Any]] = {}
    """What the first start of stage tune chose by `producer.budget_s`: fields of the producer; of an ensemble, by its members'
    folders. A spec that has them chooses nothing, however fast its machine is."""
    tables: dict[str, str] = {}
    """sha256 of `manifest.parquet` and `queries.parquet`, as they were frozen."""
    commits: Literal["create", "put"] = "put"
    """Whether the store has conditional PUTs, so that a first commit stands (`create`); tried out when the run was frozen."""
    versions: dict[str, str]
    """Of mirrorscope, Python, torch, Ray and pyarrow. Other versions may round differently."""


class Spec(Section):
    """One run, whole."""

    run: RunSection
    """Where the run lives."""
    model: ModelSection
    """The model under question."""
    ensemble: list[Member] = []
    """Further models of the same kind: scores are the mean over them and `model`, the first, of weight 1. Each is a run of its
    own in `members/` of the run's folder, and costs as much as one. Empty: `model` alone."""
    task: TaskSection
    """What the loss of one example means."""
    corpus: CorpusSection
    """The training examples."""
    queries: QueriesSection | None = None
    """What is asked about. Null with producers that tune on nothing (reference, mask_heads): they have one counterpart."""
    producer: ProducerSection = Unlearn()
    """How a counterpart is made from the base model and a query. Without a name: `natural` for classification and
    language models, else `unlearn`."""
    score: ScoreSection = ScoreSection()
    """How the corpus is cut up and run through the models."""
    rank: RankSection = RankSection()
    """What is listed."""
    resources: ResourcesSection = ResourcesSection()
    """What the run asks of Ray."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Every random number derives from it (and from the query's id)."""
    resolved: Resolved | None = None
    """Written by the pipeline into run.yaml; leave it out of a spec of your own."""

    @model_validator(mode="before")
    @classmethod
    def _judged_best(cls, data: Any) -> Any:
        """What is left out becomes what was judged best for the task (decision 12)."""
        task = data.get("task") if isinstance(data, Mapping) else None
        if not isinstance(task, Mapping):
            return data
        if task.get("name") in LANGUAGE_TASKS:
            return _judged_best_for_texts(data)
        if task.get("name", "classification") != "classification":
            return data
        producer = _named(data.get("producer"))
        released = isinstance(producer, Mapping) and producer.get("preset") == "paper"
        if task.get("temperature") is None:
            task = {**task, "temperature": RELEASED_TEMPERATURE if released else TEMPERATURE}
        return {**data, "producer": producer, "task": task}

    @model_validator(mode="after")
    def _may_be_an_ensemble(self) -> Spec:
        """See that members can take the place of `model`."""
        if not self.ensemble:
            return self
        if getattr(self.model, "weights_uri", None) is None:
            raise ValueError(
                "ensemble: members have weights of their own, and model.weights_uri, that of the first, is missing"
            )
        if getattr(self.model, "adapter_uri", None) is not None:
            raise ValueError(
                "ensemble: members replace weights, not model.adapter_uri; merge adapters into the weights"
            )
        if isinstance(self.producer, Reference):
            raise ValueError(
                "ensemble: producer reference compares one model with one other; make a run of each pair of checkpoints"
            )
        return self


def _named(producer: Any) -> Any:
    """The producer's section with a name: `natural`, but for the preset, which is one of `unlearn`."""
    if producer is not None and not isinstance(producer, Mapping):
        return producer
    return {"name": "unlearn" if "preset" in (producer or {}) else "natural", **(producer or {})}


def _judged_best_for_texts(data: Mapping[str, Any]) -> dict[str, Any]:
    """`natural` by factored curvature and derivatives, as far as nothing else is given."""
    producer, score = _named(data.get("producer")), data.get("score") or {}
    if not isinstance(producer, Mapping) or producer.get("name") != "natural" or not isinstance(score, Mapping):
        return dict(data)
    given = producer.keys() & {"curvature", "damping", "damping_share"}
    producer = {**({} if given else FACTORED), **producer}
    if not score.keys() & {"way", "compile"} and producer.get("curvature") != "gauss_newton":
        score = {**score, "way": "gradient"}
    return {**data, "producer": producer, "score": score}
