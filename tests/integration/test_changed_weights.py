"""Weights, tokenizers and adapters that change while a run works: no score is made of them, and the error says which changed."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from jobs.seaweed import upload
from pipeline import storage
from pipeline.digests import as_frozen
from pipeline.errors import ContractError, InputError
from pipeline.extensions import load_model
from pipeline.forecast import Forecast
from pipeline.freeze import freeze, survey
from pipeline.frozen_files import FrozenFiles, loaded_as_frozen
from pipeline.judge import Judge
from pipeline.lessons import Step, Whole
from pipeline.model_folder import MODEL_FILES, local_copy, model_files
from pipeline.rehearsal import rehearse
from pipeline.retrain import Retrainings, fingerprint
from pipeline.retraining import Retrainer
from pipeline.run import finish
from pipeline.scorer import ShardScorer
from pipeline.shading import shade
from pipeline.specfile import parse_spec
from pipeline.tuner import Tuner
from tests.conftest import run_without_ray
from tests.language import gpt, saved, sentences, spec_tree, tokenizer
from tests.small import linear, products, work_off

CHEAP = ("corpus.source=null", "corpus.check_ids=false")
TEXTS = sentences(12)


@pytest.fixture
def frozen(small, tmp_path):
    """`frozen("path=value", ...)`: a frozen run over it."""
    return lambda *overrides: freeze(small.spec(tmp_path / "run", *CHEAP, *overrides))


@pytest.fixture
def texts(tmp_path):
    """A language model, corpus and queries in a folder."""
    saved(gpt(), tmp_path / "model")
    pq.write_table(pa.table({"id": [f"t{i}" for i in range(12)], "text": TEXTS}), tmp_path / "corpus.parquet")
    pq.write_table(pa.table({"query_id": ["three"], "text": [TEXTS[3]]}), tmp_path / "queries.parquet")
    return tmp_path


def spec_of(folder, *overrides):
    tree = spec_tree(folder, folder / "run") | {"producer": {"name": "unlearn", "steps": 1}, "rank": {"k": 3}}
    return parse_spec(tree, overrides)


def tune(run):
    tuner = Tuner(run, "cpu")
    for query_id in run.query_ids:
        tuner.tune(query_id)


def swap(path, seed=7):
    """Other weights of the same model."""
    safetensors.torch.save_file(linear(seed).state_dict(), path)


def files(uri):
    return {path: storage.read_bytes(f"{uri}/{path}") for path in storage.objects(uri)}


def said(field, path):
    one = r"(sha256 \w+|no such file)"
    return rf"{field}: .*{path} is not what the run was frozen with: got {one}, expected {one}"


# --- a file of weights ---------------------------------------------------------------------------------------------------


def test_weights_swapped_before_tune_make_no_counterpart(small, frozen):
    """The error names field and file, got and expected; nothing is committed."""
    run = frozen()
    swap(small.folder / "linear.safetensors")
    with pytest.raises(InputError, match=said(r"model\.weights_uri", r"linear\.safetensors")) as caught:
        Tuner(run, "cpu")
    assert "put the former file back" in caught.value.hint
    assert set() == run.committed_queries()


def test_weights_swapped_between_tune_and_score_make_no_score(small, frozen):
    """Nothing is committed; put back, the run goes on to the bytes of an undisturbed one."""
    path = small.folder / "linear.safetensors"
    before = path.read_bytes()
    run = frozen()
    tune(run)
    swap(path)
    with pytest.raises(InputError, match=said(r"model\.weights_uri", r"linear\.safetensors")):
        ShardScorer(run, "cpu")
    assert set() == run.committed()
    path.write_bytes(before)
    undisturbed = work_off(freeze(small.spec(small.folder / "other", *CHEAP)))
    assert products(files(undisturbed.uri())) == products(files(work_off(run).uri()))


@pytest.mark.slow
def test_a_worker_that_starts_after_a_swap_stops(small, frozen):
    """One that has loaded goes on under the weights that it has; a later one does not start."""
    run = frozen()
    tune(run)
    works, early = list(run.works()), ShardScorer(run, "cpu")
    early.score(works[0])
    swap(small.folder / "linear.safetensors")
    with pytest.raises(InputError, match=said(r"model\.weights_uri", r"linear\.safetensors")):
        ShardScorer(run, "cpu")
    for work in works[1:]:
        early.score(work)
    shutil.copy(small.folder / "linear.safetensors", small.folder / "swapped.safetensors")
    safetensors.torch.save_file(linear(1).state_dict(), small.folder / "linear.safetensors")
    undisturbed = work_off(freeze(small.spec(small.folder / "other", *CHEAP)))
    finish(run)
    assert products(files(undisturbed.uri())) == products(files(run.uri()))


def test_weights_that_go_away_are_named(small, frozen):
    """A file that is gone is an error that names it."""
    run = frozen()
    (small.folder / "linear.safetensors").unlink()
    with pytest.raises(InputError, match=r"linear\.safetensors"):
        Tuner(run, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_members_weights_are_compared_too(small, frozen, seed):
    """Of an ensemble: those of the member that changed stop it; the others are done."""
    run = frozen(small.ensemble())
    swap(small.folder / f"linear-{seed}.safetensors")
    with pytest.raises(InputError, match=said(r"model\.weights_uri", rf"linear-{seed}\.safetensors")):
        work_off(run)
    assert set() == run.committed()


def test_a_reference_that_changed_is_no_counterpart(small, frozen):
    """Weights that a producer loads are compared, too."""
    run = frozen(f"producer={{name: reference, weights_uri: {small.folder / 'linear-2.safetensors'}}}", "queries=null")
    swap(small.folder / "linear-2.safetensors")
    with pytest.raises(InputError, match=said(r"producer\.weights_uri", r"linear-2\.safetensors")):
        tune(run)
    assert set() == run.committed_queries()


@pytest.mark.slow
def test_a_rehearsal_measures_the_model_that_was_surveyed(small, tmp_path):
    """`plan --calibrate` stops, too, where weights change after the survey."""
    run, plan = survey(small.spec(tmp_path / "run", *CHEAP))
    assert isinstance(rehearse(run, plan), Forecast)
    swap(small.folder / "linear.safetensors")
    with pytest.raises(InputError, match=said(r"model\.weights_uri", r"linear\.safetensors")):
        rehearse(run, plan)


@pytest.mark.slow
def test_retraining_starts_from_what_it_was_begun_with(small, frozen, tmp_path):
    """A worker that finds another model before training does not train it; nor one that finds it later."""
    run = frozen()
    start = {"factory": "tests.small:linear", "weights_uri": str(small.folder / "linear-2.safetensors")}
    judge = Judge.model_validate(
        {"runs": {"one": run.uri()}, "judge": {"uri": str(tmp_path / "judge")},
         "training": {"start": start, "epochs": 1, "lr": 0.1, "batch_rows": 4}, "lds": {"subsets": 3}}
    )  # fmt: skip
    retrainer = Retrainer(run, judge.training, "cpu")
    retrainings = Retrainings(judge, run, fingerprint(judge, run, retrainer.examples))
    swap(small.folder / "linear-2.safetensors")
    with pytest.raises(InputError, match=said(r"training\.start\.weights_uri", r"linear-2\.safetensors")):
        retrainer.learned(Whole(None, 0), 0)
    with pytest.raises(InputError, match=r"linear-2\.safetensors changed since these retrainings began"):
        retrainings.do(Retrainer(run, judge.training, "cpu"), Whole(None, 0))
    swap(small.folder / "linear.safetensors")
    with pytest.raises(InputError, match=said(r"model\.weights_uri", r"linear\.safetensors")):
        retrainer.learned(Step(0, 0.1, "own"), 0)


@pytest.mark.slow
def test_weights_on_a_store_are_compared_by_what_is_read(small, s3, tmp_path):
    """S3: swapped before tune, and between tune and score; with bytes of the same number."""
    prefix = s3.prefix("weights")
    uri = upload(small.folder / "linear.safetensors", f"{prefix}/linear.safetensors")
    run = freeze(small.spec(f"{prefix}/run", *CHEAP, f"model.weights_uri={uri}"))
    upload(small.folder / "linear-2.safetensors", uri)
    with pytest.raises(InputError, match=said(r"model\.weights_uri", r"linear\.safetensors")):
        Tuner(run, "cpu")
    upload(small.folder / "linear.safetensors", uri)
    tune(run)
    upload(small.folder / "linear-2.safetensors", uri)
    with pytest.raises(InputError, match=said(r"model\.weights_uri", r"linear\.safetensors")):
        ShardScorer(run, "cpu")
    assert set() == run.committed()


# --- folders -------------------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fast_first(kinds):
    """All kinds as parameters; those after the first are slow."""
    return [
        pytest.param(*kind, id=name, marks=[pytest.mark.slow] * (n > 0)) for n, (name, kind) in enumerate(kinds.items())
    ]


CHANGED = {
    "one bit of the weights": ("model.safetensors", flip, r"model\.weights_uri"),
    "the config": ("config.json", lambda path: path.write_text(path.read_text() + " "), r"task\.config_uri"),
    "the tokenizer": ("tokenizer.json", flip, r"task\.tokenizer_uri"),
    "the template": ("chat_template.jinja", lambda path: path.write_text("other"), r"task\.tokenizer_uri"),
    "a file that is new": ("added_tokens.json", lambda path: path.write_text("{}"), r"task\.tokenizer_uri"),
    "a file that is gone": ("tokenizer_config.json", Path.unlink, r"task\.tokenizer_uri"),
}


@pytest.mark.parametrize(("name", "change", "field"), fast_first(CHANGED))
def test_a_file_of_a_folder_that_changed_is_named(texts, name, change, field):
    """Between freeze and tune, and between tune and score: field and file, and nothing is committed."""
    run = freeze(spec_of(texts))
    tune(run)
    change(texts / "model" / name)
    for load in (lambda: Tuner(run, "cpu"), lambda: ShardScorer(run, "cpu")):
        with pytest.raises(InputError, match=said(rf"({field}|task\.\w+)", name)):
            load()
    assert set() == run.committed()


@pytest.mark.slow
def test_tokens_are_not_shaded_by_another_model(texts):
    """`show --tokens` compares as well."""
    run = run_without_ray(spec_of(texts))
    finish(run)
    assert Path(shade(run, "three", 1)).exists()
    saved(gpt(5), texts / "model")
    with pytest.raises(InputError, match=said(r"model\.weights_uri", r"model\.safetensors")):
        shade(run, "three", 1)


@pytest.mark.slow
def test_an_adapter_that_changed_is_named(texts):
    """The base is the same, the adapter in it is not."""
    from peft import LoraConfig, get_peft_model

    def adapter(seed):
        base = gpt()
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
        model.save_pretrained(texts / "adapter")

    adapter(0)
    run = freeze(spec_of(texts, f"model.adapter_uri={texts / 'adapter'}"))
    tune(run)
    adapter(1)
    with pytest.raises(InputError, match=said(r"model\.adapter_uri", r"adapter_model\.safetensors")):
        ShardScorer(run, "cpu")


@pytest.mark.slow
def test_a_tokenizer_on_a_store_is_compared(texts, s3):
    """S3: another vocabulary under the same name stops the run; the private copy of the former one is not used either."""
    uri = s3.prefix("tokenizer")
    for path in sorted((texts / "model").iterdir()):
        upload(path, f"{uri}/{path.name}")
    run = freeze(spec_of(texts, f"task.tokenizer_uri={uri}"))
    tune(run)
    tokenizer(texts=["something else"] * 9).save_pretrained(texts / "other")
    upload(texts / "other" / "tokenizer.json", f"{uri}/tokenizer.json")
    with pytest.raises(InputError, match=said(r"task\.tokenizer_uri", r"tokenizer\.json")):
        ShardScorer(run, "cpu")


def test_a_model_that_is_loaded_does_not_change_with_its_file(texts):
    """Weights lie in the process's own memory: the file is written over in place, and losses stay."""
    run = freeze(spec_of(texts))
    with as_frozen(run):
        model = load_model(run.spec.model, "cpu", 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = texts / "model" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert [] == [name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)]


@pytest.fixture
def folder(texts):
    """What a run was frozen with of the language model's folder."""
    uri = str(texts / "model")
    return FrozenFiles("model.weights_uri", uri, MODEL_FILES, model_files(uri))


def in_place_and_back(path):
    data = path.read_bytes()
    path.write_bytes(data)


LATE = {
    "written in place": (flip, "was written while it was read"),
    "written with the same bytes": (in_place_and_back, "was written while it was read"),
    "replaced": (lambda path: os.replace(shutil.copy(path, f"{path}.new"), path), "was written while it was read"),
    "gone": (Path.unlink, "went away while it was read"),
    "joined by another": (lambda path: path.with_name("added_tokens.json").write_text("{}"), "expected no such file"),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("change", "match"), fast_first(LATE))
def test_what_changes_while_a_library_reads_it_is_not_used(folder, change, match, fails):
    """Compared before, changed then: the end of the load finds it, whatever it was changed to and whatever the library said."""

    def load():
        with loaded_as_frozen([folder]):
            change(Path(local_copy(folder.uri)) / "model.safetensors")
            if fails:
                raise ContractError("weights do not fit")

    with pytest.raises(InputError, match=match):
        load()


def test_metadata_may_change_while_a_library_reads(folder):
    """A hard link or another mode is no other file."""
    with loaded_as_frozen([folder]):
        place = Path(local_copy(folder.uri))
        (place / "model.safetensors").chmod(0o600)
        os.link(place / "model.safetensors", place / "a-backup")


def test_other_loads_are_free(folder, tmp_path):
    """Files that are not the run's are loaded as they are; and so is everything outside of a run."""
    saved(gpt(3), tmp_path / "other")
    with loaded_as_frozen([folder]):
        assert str(tmp_path / "other") == local_copy(str(tmp_path / "other"))
    flip(Path(folder.uri) / "model.safetensors")
    assert folder.uri == local_copy(folder.uri)
