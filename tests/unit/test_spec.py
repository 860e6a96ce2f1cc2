"""The spec: what is refused, how it is said, and that nothing is lost on the way to a file and back."""

import copy
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import SpecError
from pipeline.producer_choices import PAPER
from pipeline.records import Transform
from pipeline.sections import Section
from pipeline.spec import Spec
from pipeline.specfile import changed_fields, dump_spec, load_spec, parse_spec, sections_of

TREE = {
    "run": {"uri": "runs/x"},
    "model": {"factory": "jobs.digits:cnn"},
    "task": {"shape": [1, 8, 8]},
    "corpus": {"uri": "corpus"},
    "queries": {"uri": "queries"},
}


def parse(*overrides, **sections):
    return parse_spec(copy.deepcopy({**TREE, **sections}), overrides)


def test_a_minimal_spec_has_working_defaults():
    """Five sections are enough; the producer is natural, the temperature 2 and the transform signed."""
    spec = parse()
    assert ("natural", 2, "signed", 0) == (spec.producer.name, spec.task.temperature, spec.rank.transform, spec.seed)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run.uri", "s3://key:hunter%402@bucket/run"),
        ("corpus.uri", "s3://AKIAIOSFODNNHUNTER2@bucket/corpus"),
        ("queries.uri", "https://host/queries?X-Amz-Signature=hunter2"),
        ("model.arguments", "{data: [{uri: 's3://key:hunter 2@bucket'}]}"),
        ("resources.address", "ray://user:hunter2@head"),
        ("seed", "s3://key:hunter2@bucket"),
        ("s3://key:hunter2@bucket", "1"),
    ],
)
def test_credentials_are_refused_in_every_field_and_never_repeated(path, value):
    """From a file and by --set: run.yaml holds every field."""
    with pytest.raises(SpecError) as caught:
        parse(f"{path}={value}")
    assert "hunter" not in str(caught.value).lower()


def test_the_released_recipe_is_one_word_away():
    """`preset: paper` brings its temperature along, unless another is given."""
    assert ("unlearn", 1) == ((spec := parse(producer={"preset": "paper"})).producer.name, spec.task.temperature)
    assert 3 == parse("task.temperature=3", producer={"preset": "paper"}).task.temperature


TEXTS = {"name": "causal_lm", "tokens": "ids"}


@pytest.mark.parametrize(
    ("expected", "task", "producer"),
    [
        ("natural", {"shape": [4]}, {"sample_rows": 9}),
        ("natural", TEXTS, {"last_blocks": 1}),
        ("unlearn", {"shape": [4]}, {"preset": "paper"}),
        ("unlearn", {"name": "mine:Task"}, {"lr": 0.1}),
    ],
)
def test_a_producers_fields_without_a_name_are_those_of_the_default(expected, task, producer):
    """`--set producer.sample_rows=9` is enough to change a field of what the task gets by default."""
    spec = parse(task=task, producer=producer)
    assert expected == spec.producer.name
    assert producer.items() <= spec.producer.model_dump().items()


def test_an_unknown_field_is_told_whose_it_is_not():
    """A producer that was not named is."""
    with pytest.raises(SpecError, match=r"producer\.lr: 'lr' is not known; (.|\n)*; these are fields of natural"):
        parse(producer={"lr": 0.1})


@pytest.mark.parametrize("task", [TEXTS, {"name": "seq2seq"}])
@pytest.mark.parametrize("producer", [None, {"name": "natural"}, {"name": "natural", "sample_rows": 9}])
def test_language_models_get_factored_curvature_and_derivatives(task, producer):
    """Each layer damped by a share of its own; scored by the gradient method."""
    spec = parse(task=task, **({"producer": producer} if producer else {}))
    assert ("natural", "ekfac", 0.1, None) == (
        spec.producer.name, spec.producer.curvature, spec.producer.damping_share, spec.producer.damping
    )  # fmt: skip
    assert "gradient" == spec.score.way


def test_what_is_given_for_a_language_model_stays():
    """Other producers are scored as ever; a damping, a curvature or a way that is given is not touched."""
    for producer in ({"name": "unlearn"}, {"name": "finetune"}, {"preset": "paper"}):
        assert "auto" == parse(task=TEXTS, producer=producer).score.way
    found = parse(task=TEXTS, producer={"name": "natural", "damping": 0.5, "curvature": "diagonal"})
    assert (0.5, None, "gradient") == (found.producer.damping, found.producer.damping_share, found.score.way)
    assert "auto" == parse(task=TEXTS, producer={"name": "natural", "curvature": "gauss_newton"}).score.way
    assert "jvp" == parse("score.way=jvp", task=TEXTS).score.way
    assert "auto" == parse("score.compile=true", task=TEXTS).score.way


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"damping": 1, "damping_share": 0.1, "curvature": "ekfac"}, "give one of them"),
        ({"damping_share": 0.1, "curvature": "gauss_newton"}, "goes with a curvature of layers"),
        ({"damping_share": 0, "curvature": "ekfac"}, "greater than 0"),
    ],
)
def test_a_damping_is_in_one_unit(fields, message):
    """In nats, or in each layer's mean eigenvalue."""
    with pytest.raises(SpecError, match=message):
        parse(producer={"name": "natural", **fields})


def test_unknown_keys_name_the_nearest_known_one():
    """A typo is answered with the word that was meant."""
    with pytest.raises(SpecError, match=r"score\.batchrows: 'batchrows' is not known; did you mean 'batch_rows'"):
        parse(score={"batchrows": 3})
    with pytest.raises(SpecError, match=r"producer\.name: 'unlern' is not known; did you mean 'unlearn'"):
        parse(producer={"name": "unlern"})
    with pytest.raises(SpecError, match=r"sed: 'sed' is not known; did you mean 'seed'"):
        parse(sed=3)


def test_all_problems_are_reported_at_once_with_their_paths():
    """Three mistakes in three sections make one error with three lines."""
    with pytest.raises(SpecError, match="3 problems") as caught:
        parse(corpus={}, score={"batch_rows": 0}, model={"factory": "jobs.digits:cnn", "dtype": "float31"})
    lines = str(caught.value).splitlines()
    assert ["model.dtype", "corpus.uri", "score.batch_rows"] == [line.strip().split(":")[0] for line in lines[1:]]


@pytest.mark.parametrize("way", ["gradient", "jvp"])
def test_what_would_not_be_compiled_is_not_to_be(way):
    """A way that runs the model as it is."""
    with pytest.raises(SpecError, match=f"score: compile goes with way difference: way {way} runs the model as it is"):
        parse("score.compile=true", f"score.way={way}")


def test_a_spec_is_frozen():
    """Nothing changes a parsed spec in place."""
    with pytest.raises(ValueError, match="frozen"):
        parse().rank.k = 3


def test_overrides_win_over_the_file_and_parse_as_yaml():
    """--set reaches any depth and makes sections that the file leaves out."""
    spec = parse("rank.k=3", "resources.tune.workers=4", "corpus.payload=[label, text]")
    assert (3, 4, ["label", "text"]) == (spec.rank.k, spec.resources.tune.workers, spec.corpus.payload)


@pytest.mark.parametrize("override", ["rank.k", "=3", "run.uri.deeper=3", "rank.k=[1"])
def test_malformed_overrides_are_refused(override):
    """An override that says nothing usable is named."""
    with pytest.raises(SpecError, match="--set"):
        parse(override)


def test_the_paper_preset_fills_the_released_recipe():
    """`preset: paper` is Ko et al.'s recipe; fields beside it win."""
    assert PAPER.items() <= parse(producer={"preset": "paper"}).producer.model_dump().items()
    mixed = parse(producer={"preset": "paper", "lr": 0.5}).producer
    assert (0.5, "adam") == (mixed.lr, mixed.optimizer)


def test_files_that_are_no_spec_are_refused(tmp_path: Path):
    """Missing, not YAML, not a mapping: each says so."""
    with pytest.raises(SpecError, match="does not exist"):
        load_spec(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(SpecError, match="is not YAML"):
        load_spec(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(SpecError, match="got list, expected a mapping"):
        load_spec(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize(("path", "section"), sections_of().items(), ids=sections_of())
def test_every_field_is_explained(path: str, section: type[Section]):
    """Every field of every section carries its meaning, for `mirrorscope fields` and for readers."""
    silent = [name for name, field in section.model_fields.items() if not field.description]
    assert [] == silent


specs = st.fixed_dictionaries(
    {
        "producer": st.one_of(
            st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["unlearn", "finetune"]),
                    "lr": st.floats(1e-8, 10),
                    "steps": st.integers(1, 99),
                }
            ),
            st.fixed_dictionaries(
                {"name": st.just("unlearn"), "preset": st.just("paper"), "noise_tries": st.integers(1, 9)}
            ),
            st.fixed_dictionaries(
                {"name": st.just("my.module:Class"), "options": st.dictionaries(st.text(max_size=5), st.integers())}
            ),
        ),
        "rank": st.fixed_dictionaries({"k": st.integers(1, 10**6), "transform": st.sampled_from(get_args(Transform))}),
        "score": st.fixed_dictionaries(
            {"shard_rows": st.none() | st.integers(1, 10**9), "max_reject_fraction": st.floats(0, 1)}
        ),
        "seed": st.integers(0, 2**31 - 1),
        "run": st.fixed_dictionaries({"uri": st.text(min_size=1)}),
    }
)


@given(specs)
def test_a_spec_survives_the_way_to_a_file_and_back(sections):
    """spec -> text -> spec is the identity, so run.yaml runs again as is."""
    spec = parse(**sections)
    assert spec == parse_spec(yaml.safe_load(dump_spec(spec)))
    assert isinstance(spec, Spec)


def test_changed_fields_names_every_leaf():
    """The refusal of a changed spec can say what changed, at any depth."""
    before, after = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"b": 2, "c": [1]}, "e": 1}
    assert ["a.b: 1 -> 2", "d: 1 -> left out", "e: left out -> 1"] == changed_fields(before, after)
