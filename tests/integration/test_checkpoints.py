"""Checkpoints as members: what a glob in `ensemble` finds when a run is frozen, and that it stays so."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch

from jobs.display import show_plan
from pipeline import checkpoints, storage
from pipeline.audit import audit
from pipeline.checkpoints import beside, natural
from pipeline.errors import ArtifactError, InputError, SpecError
from pipeline.extend import extend
from pipeline.freeze import freeze, survey
from pipeline.frozen import open_run
from pipeline.producer_choices import Unlearn
from pipeline.specfile import load_spec, parse_spec
from tests.conftest import exit_code, read_scores
from tests.language import gpt, saved, sentences
from tests.small import linear, work_off

STEPS = (900, 1000, 1100)


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(linear(seed).state_dict(), path)
    return path


@pytest.fixture
def models(small, tmp_path):
    """A folder with checkpoints step-900 to step-1100, and what else a training leaves there."""
    folder = tmp_path / "models"
    for seed, step in enumerate(STEPS, start=10):
        write(folder / f"step-{step}.safetensors", seed)
    (folder / "step-900.json").write_text("{}")
    (folder / ".step-1200.safetensors.tmp").write_bytes(b"half")
    return folder


def names(spec):
    """File names of the further members that a run of a spec would have."""
    return [Path(member.weights_uri).name for member in survey(spec)[0].spec.ensemble]


def spec_of(small, tmp_path, *entries, **model):
    overrides = [f"model.{name}={value}" for name, value in model.items()]
    return small.spec(tmp_path / "run", f"ensemble={json.dumps(list(map(as_entry, entries)))}", *overrides)


def as_entry(entry):
    return str(entry) if isinstance(entry, Path) else entry


# --- what a glob finds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glob", ["step-*.safetensors", "step-*", "*", "step-*.safe*", "**/step-*.safetensors"])
def test_a_glob_is_its_files_of_weights_in_natural_order(small, models, tmp_path, glob):
    """Step 900 comes before step 1000; other files and hidden ones are no members."""
    assert [f"step-{step}.safetensors" for step in STEPS] == names(spec_of(small, tmp_path, models / glob))


def test_weights_of_another_suffix_are_found_by_naming_it(small, models, tmp_path):
    """Checkpoints saved by torch beside a base in safetensors."""
    for epoch in (2, 10):
        (models / f"epoch_{epoch}.pt").write_bytes(b"weights of epoch %d" % epoch)
    assert ["epoch_2.pt", "epoch_10.pt"] == names(spec_of(small, tmp_path, models / "epoch_*.pt"))


def test_each_model_of_a_glob_has_the_weight_of_its_entry(small, models, tmp_path):
    """Entries keep their order; a bare one has weight 1."""
    other = str(small.folder / "linear-2.safetensors")
    glob = {"weights_uri": str(models / "step-1*.safetensors"), "weight": 0.25}
    members = survey(spec_of(small, tmp_path, other, glob))[0].spec.ensemble
    assert [1.0, 0.25, 0.25] == [member.weight for member in members]


def test_a_glob_relative_to_the_working_folder_is_frozen_absolute(small, models, tmp_path, monkeypatch):
    """The run means the same from any folder."""
    monkeypatch.chdir(tmp_path)
    members = survey(spec_of(small, tmp_path, "models/step-*.safetensors"))[0].spec.ensemble
    assert str(models / "step-900.safetensors") == members[0].weights_uri


def test_the_model_itself_is_no_further_member(small, models, tmp_path, capsys):
    """A glob that matches model.weights_uri leaves it out, and says so."""
    found = names(spec_of(small, tmp_path, models / "step-*.safetensors", weights_uri=models / "step-1000.safetensors"))
    assert ["step-900.safetensors", "step-1100.safetensors"] == found
    assert "left out, since they are members already or no weights: step-1000.safetensors" in capsys.readouterr().err


def test_a_copy_of_the_model_under_another_name_is_left_out(small, models, tmp_path, capsys):
    """As where the last checkpoint was copied to model.safetensors; the members behind it keep their own weights."""
    shutil.copy(models / "step-900.safetensors", tmp_path / "model.safetensors")
    spec = spec_of(small, tmp_path, models / "step-*.safetensors", weights_uri=tmp_path / "model.safetensors")
    run, plan = survey(spec)
    assert ["step-1000.safetensors", "step-1100.safetensors"] == names(spec)
    assert 3 == plan.members
    expected = storage.file_digest(str(models / "step-1000.safetensors"))
    assert expected == run.resolved.digests["ensemble.0.weights_uri"]
    assert "hold the weights of other members" in capsys.readouterr().err


def test_what_is_named_by_itself_keeps_its_own_weight(small, models, tmp_path):
    """A glob does not take it a second time, wherever it stands; nor do two globs."""
    named = {"weights_uri": str(models / "step-1100.safetensors"), "weight": 3}
    entries = (models / "step-1*.safetensors", models / "step-*.safetensors", named)
    members = survey(spec_of(small, tmp_path, *entries))[0].spec.ensemble
    found = [(Path(member.weights_uri).name, member.weight) for member in members]
    assert [("step-1000.safetensors", 1), ("step-900.safetensors", 1), ("step-1100.safetensors", 3)] == found


@pytest.mark.parametrize("name", ["step-[12].safetensors", "step-*.safetensors", "step?.safetensors"])
def test_a_path_that_exists_is_no_glob(small, models, tmp_path, name):
    """Whatever characters are in it."""
    write(models / name, 20)
    assert [name] == names(spec_of(small, tmp_path, models / name))


@pytest.mark.parametrize(
    ("glob", "message"),
    [
        ("step-2*.safetensors", "ensemble.0.weights_uri: no file of weights matches .*step-2"),
        ("nowhere/step-*.safetensors", "no file of weights matches"),
        ("step-900.j*", "no file of weights matches"),
        ("checkpoint-*/", "no file of weights matches .*checkpoint-"),
    ],
    ids=["no-match", "no-folder", "no-weights", "folders"],
)
def test_a_glob_without_a_match_is_an_error_before_work(small, models, tmp_path, glob, message):
    """It names the entry and the glob; nothing is written."""
    (models / "checkpoint-1").mkdir()
    (models / "checkpoint-1" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        freeze(spec_of(small, tmp_path, f"{models}/{glob}"))
    assert not (tmp_path / "run").exists()


def test_a_glob_without_a_match_is_told_before_the_corpus_is_read(small, models, tmp_path):
    """A corpus may take minutes to look through; here it is not even there."""
    spec = spec_of(small, tmp_path, models / "step-2*")
    nowhere = spec.corpus.model_copy(update={"uri": str(tmp_path / "nowhere")})
    with pytest.raises(InputError, match="no file of weights matches"):
        survey(spec.model_copy(update={"corpus": nowhere}))


def test_a_glob_of_the_model_alone_is_an_error(small, models, tmp_path):
    """By its path, and by a copy of it."""
    with pytest.raises(InputError, match="but the weights of other members"):
        survey(spec_of(small, tmp_path, models / "step-9*", weights_uri=models / "step-900.safetensors"))
    shutil.copy(models / "step-900.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(SpecError, match="matches nothing but copies of other members"):
        survey(spec_of(small, tmp_path, models / "step-9*", weights_uri=tmp_path / "model.safetensors"))


def test_the_model_that_is_missing_is_named(small, models, tmp_path):
    """Not the glob, though nothing tells whether it is to match files or folders."""
    with pytest.raises(InputError, match=r"model\.weights_uri: .*gone\.safetensors does not exist"):
        survey(spec_of(small, tmp_path, models / "step-*", weights_uri=models / "gone.safetensors"))


def test_natural_order():
    """Numbers count as numbers, in folders too."""
    paths = ["b/2", "a/step-10", "a/step-9", "a/step-09", "a/step", "a10/1", "a9/2"]
    assert ["a9/2", "a10/1", "a/step", "a/step-09", "a/step-9", "a/step-10", "b/2"] == sorted(paths, key=natural)


# --- what is found stays found -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_found_is_frozen_with_the_run(small, models, tmp_path):
    """A checkpoint that arrives later changes nothing: a resumed run, an extended one and run.yaml have the same members."""
    spec = spec_of(small, tmp_path, {"weights_uri": str(models / "step-*.safetensors"), "weight": 0.5})
    run = work_off(freeze(spec))
    before = read_scores(run)
    write(models / "step-1200.safetensors", 30)
    write(models / "step-100.safetensors", 31)
    again = work_off(freeze(spec))
    assert [f"step-{step}.safetensors" for step in STEPS] == names(spec)
    assert (run.resolved.fingerprint, before) == (again.resolved.fingerprint, read_scores(again))
    assert run.resolved.fingerprint == freeze(load_spec(run.uri("run.yaml"))).resolved.fingerprint
    grown = work_off(extend(run.uri(), small.later[0], None))
    assert 4 == len(grown.members)
    assert {*run.query_ids, "blue"} == set(read_scores(grown)["query_id"].to_pylist())
    assert ([], True) == ((found := audit(grown, shown=False)).damage, found.sealed)


@pytest.mark.slow
def test_another_glob_or_weight_is_another_spec(small, models, tmp_path):
    """A run that has begun is refused to it; a checkpoint that is gone or changed is named."""
    glob = str(models / "step-*.safetensors")
    work_off(freeze(spec_of(small, tmp_path, glob)))
    for other in (str(models / "step-1*.safetensors"), {"weights_uri": glob, "weight": 2}):
        with pytest.raises(ArtifactError, match=r"made by another spec:\n +ensemble"):
            freeze(spec_of(small, tmp_path, other))
    write(models / "step-1000.safetensors", 40)
    with pytest.raises(ArtifactError, match=r"ensemble\.1\.weights_uri: the file's contents"):
        freeze(spec_of(small, tmp_path, glob))
    (models / "step-1000.safetensors").unlink()
    with pytest.raises(InputError, match=r"step-1000\.safetensors"):
        freeze(spec_of(small, tmp_path, glob))


def test_a_run_that_has_not_begun_takes_what_it_found_first(small, models, tmp_path):
    """Until its spec changes: then it is frozen again."""
    spec = spec_of(small, tmp_path, models / "step-*.safetensors")
    freeze(spec)
    write(models / "step-1200.safetensors", 30)
    assert 3 == len(freeze(spec).spec.ensemble)
    assert 4 == len(freeze(spec.model_copy(update={"seed": 1})).spec.ensemble)
    assert 4 == len(open_run(str(tmp_path / "run")).resolved.found[str(models / "step-*.safetensors")])


# --- the hint of `plan` ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "own", "expected"),
    [
        (["step-500.safetensors", "step-1000.safetensors", "step-500.json"], "final.safetensors", ("step-*", 2)),
        (["step-500.safetensors", "step-1000.safetensors"], "step-1000.safetensors", ("step-*", 1)),
        (["epoch_3.pt", "epoch_12.pt", "step-1.safetensors"], "model.pt", ("epoch_*", 2)),
        (["my.model-step5-ema.pt"], "my.model.pt", ("my.model-step*-ema", 1)),
        (
            ["seed-1.safetensors", "footstep-2.safetensors", "model-00001-of-00002.safetensors"],
            "model.safetensors",
            None,
        ),
        (["step-500.pt"], "model.safetensors", None),
        ([], "model.safetensors", None),
    ],
)
def test_checkpoints_beside_the_weights_are_known_by_their_names(tmp_path, names, own, expected):
    """Those with a number of steps or epochs and the suffix of the weights, which are none of them."""
    for name in [*names, own]:
        (tmp_path / name).write_bytes(b"")
    glob = expected and (f"{tmp_path}/{expected[0]}{Path(own).suffix}", expected[1])
    assert glob == beside(str(tmp_path / own))


def test_of_a_huge_folder_some_names_are_looked_at(tmp_path, monkeypatch):
    """A folder with more names costs no more; what is no folder has no checkpoints."""
    monkeypatch.setattr(checkpoints, "LOOKED_AT", 5)
    for step in range(20):
        (tmp_path / f"step-{step}.pt").write_bytes(b"")
    _, number = beside(str(tmp_path / "model.pt"))
    assert 5 == number
    assert beside(str(tmp_path / "nowhere" / "model.pt")) is None


def test_plan_hints_at_checkpoints_of_a_language_model(language, tmp_path, capsys):
    """Inside the model's folder or beside it, whole ones; not where they are members, nor of another producer."""
    spec = language()
    assert f"hint 2 checkpoints beside the weights: `ensemble: [{tmp_path}/out/checkpoint-*]`" in planned(spec, capsys)
    shutil.copytree(tmp_path / "out" / "checkpoint-900", tmp_path / "epoch-1")
    shutil.rmtree(tmp_path / "out" / "checkpoint-900")
    shutil.rmtree(tmp_path / "out" / "checkpoint-1000")
    assert f"hint 1 checkpoint beside the weights: `ensemble: [{tmp_path}/epoch-*]`" in planned(spec, capsys)
    assert "beside the weights" not in planned(language(f"{tmp_path}/epoch-*"), capsys)
    assert "beside the weights" not in planned(spec.model_copy(update={"producer": Unlearn()}), capsys)


def test_plan_names_what_a_glob_found(language, tmp_path, capsys):
    """How many models there are, and which."""
    shown = planned(language(f"{tmp_path}/out/checkpoint-*"), capsys)
    assert "members 3, each a run of its own" in shown
    assert f"checkpoints 2 by {tmp_path}/out/checkpoint-*: checkpoint-900, checkpoint-1000" in shown


def planned(spec, capsys):
    """What `plan` shows of a spec, in one line."""
    show_plan(*survey(spec))
    return " ".join(capsys.readouterr().out.split())


# --- folders, stores ---------------------------------------------------------------------------------------------------


@pytest.fixture
def language(tmp_path):
    """`language(entry)`: a spec of an ensemble of language models, with checkpoint folders inside the model's own."""
    for step, folder in ((0, "."), (900, "checkpoint-900"), (1000, "checkpoint-1000")):
        saved(gpt(step), tmp_path / "out" / folder)
    (tmp_path / "out" / "checkpoint-1100").mkdir()
    (tmp_path / "out" / "checkpoint-1100" / "optimizer.bin").write_bytes(b"not whole yet")
    (tmp_path / "out" / "checkpoint-notes.txt").write_text("a file")
    texts = sentences(8)
    pq.write_table(pa.table({"id": [f"text-{i}" for i in range(8)], "text": texts}), tmp_path / "corpus.parquet")
    pq.write_table(pa.table({"query_id": ["red"], "text": texts[3:4]}), tmp_path / "queries.parquet")

    def spec(*entries, weights_uri=tmp_path / "out"):
        tree = {
            "run": {"uri": str(tmp_path / "run")},
            "model": {"loader": "hf_transformers", "weights_uri": str(weights_uri)},
            "ensemble": list(entries),
            "task": {"name": "causal_lm"},
            "corpus": {"uri": str(tmp_path / "corpus.parquet"), "example_id": "id"},
            "queries": {"uri": str(tmp_path / "queries.parquet")},
        }
        return parse_spec(tree)

    return spec


@pytest.mark.parametrize("glob", ["checkpoint-*/", "checkpoint-*", "*"])
def test_folders_of_models_are_found_where_the_model_is_one(language, tmp_path, capsys, glob):
    """Folders with a config.json; one that is not whole yet is left out, and named."""
    run, plan = survey(language(f"{tmp_path}/out/{glob}"))
    assert ["checkpoint-900", "checkpoint-1000"] == [Path(each.weights_uri).name for each in run.spec.ensemble]
    assert 3 == plan.members
    assert "no weights: checkpoint-1100" in capsys.readouterr().err


def test_folders_need_a_config(language, tmp_path):
    """Where none that matches has one, that is said."""
    with pytest.raises(InputError, match=r"ensemble\.0\.weights_uri: no folder with a config\.json matches"):
        survey(language(f"{tmp_path}/out/checkpoint-11*"))
    with pytest.raises(InputError, match=r"no folder with a config\.json matches"):
        survey(language(f"{tmp_path}/out/checkpoint-*.txt"))


def test_a_folder_with_the_models_weights_and_another_tokenizer_is_a_copy(language, tmp_path):
    """The tensors decide."""
    shutil.copytree(tmp_path / "out" / "checkpoint-1000", tmp_path / "final")
    (tmp_path / "final" / "vocab.txt").write_text("one more file")
    run, _ = survey(language(f"{tmp_path}/out/checkpoint-*", weights_uri=tmp_path / "final"))
    assert ["checkpoint-900"] == [Path(each.weights_uri).name for each in run.spec.ensemble]


@pytest.mark.slow
def test_the_mean_over_checkpoints_of_a_language_model(language, tmp_path, monkeypatch):
    """Done, verified, and the same members when the command is given once more."""
    spec = language(f"{tmp_path}/out/checkpoint-*")
    run = work_off(freeze(spec))
    saved(gpt(7), tmp_path / "out" / "checkpoint-1100")
    assert 3 == len(work_off(freeze(spec)).members)
    assert 0 == exit_code(monkeypatch, "verify", run.uri())


@pytest.mark.slow
def test_a_glob_on_a_store(small, models, tmp_path, s3_fresh):
    """Files and folders under s3://; the model itself left out though its scheme is spelt another way."""
    prefix = s3_fresh.prefix("models")
    for path in models.iterdir():
        storage.write_bytes(f"{prefix}/{path.name}", path.read_bytes())
    base = f"{prefix}/step-1100.safetensors".replace("s3://", "s3a://")
    assert ["step-900.safetensors", "step-1000.safetensors"] == names(
        spec_of(small, tmp_path, f"{prefix}/step-*.safetensors", weights_uri=base)
    )
    with pytest.raises(InputError, match="no file of weights matches"):
        survey(spec_of(small, tmp_path, f"{prefix}/epoch-*", weights_uri=base))
    assert (f"{prefix}/step-*.safetensors", 3) == beside(f"{prefix}/model.safetensors")
    for step in (5, 10):
        storage.write_bytes(f"{prefix}/out/checkpoint-{step}/config.json", b"{}")
    storage.write_bytes(f"{prefix}/out/config.json", b"{}")
    assert (f"{prefix}/out/checkpoint-*", 2) == beside(f"{prefix}/out")
