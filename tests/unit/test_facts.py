"""The benchmark of facts: what the slice holds, and that its truth is one."""

from collections import Counter

import torch

from jobs import facts
from tests.language import gpt, tokenizer


def test_the_slice_is_whole():
    """Every relation has a pattern to be asked in, which ends with the object, and enough others; the subject comes first."""
    facts_, patterns = facts.load_facts(), facts.load_patterns()
    asked_in = {first for first, *_ in patterns.values()}
    assert 1000 == len(facts_) == len({fact.id for fact in facts_})
    assert 200 < len(facts.twins(facts_))
    assert {1} == set(Counter(each for some in patterns.values() for each in some).values()), "says two relations"
    for relation in {fact.relation for fact in facts_}:
        assert len([each for each in patterns[relation] if each not in asked_in]) >= facts.SENTENCES_PER_FACT
        assert patterns[relation][0].endswith("[Y].")
        assert all(each.count("[X]") == each.count("[Y]") == 1 for each in patterns[relation])
        assert all(each.index("[X]") < each.index("[Y]") for each in patterns[relation])


def test_no_sentence_is_in_a_pattern_that_is_asked_in():
    """Each fact is stated twice, differently, with subject and object; the question's words before the object in none."""
    patterns = facts.load_patterns()
    some = facts.chosen(facts.load_facts(), 100)
    rows = facts.sentences(some, patterns)
    assert {2} == set(Counter(row["fact"] for row in rows).values())
    assert 200 == len({row["id"] for row in rows}) == len({(row["text"], row["fact"]) for row in rows})
    assert all(row["subject"] in row["text"] and row["object"] in row["text"] for row in rows)
    stated = {row["text"] for row in rows}
    asked = facts.queries(some, patterns)
    assert not stated & {row["prompt"] + row["text"] for row in asked}
    assert all(row["prompt"].startswith(row["subject"]) or row["subject"] in row["prompt"] for row in asked)


def test_questions_are_about_subjects_of_several_facts():
    """No fact is in two files, so what chooses a recipe never judges it; half of each are twins; all were learned."""
    told = facts.chosen(facts.load_facts(), facts.FACTS)
    named, twin_ids = Counter(fact.subject for fact in told), {fact.id for fact in facts.twins(told)}
    learned = told[: len(told) // 2] + told[-60:]
    files = facts.asked(told, learned)
    assert facts.QUERIES == {name: len(drawn) for name, drawn in files.items()}
    for drawn in files.values():
        assert len(drawn) == 2 * sum(fact.id in twin_ids for fact in drawn)
    every = [fact for drawn in files.values() for fact in drawn]
    assert len(every) == len({fact.id for fact in every})
    assert all(named[fact.subject] > 1 and fact in learned for fact in every)
    assert facts.asked(told, learned) == files


def test_twins_share_subject_and_object():
    """Born there and died there are twins; born there and born elsewhere are not."""
    born, died, other = (
        facts.Fact(str(i), r, "Ada", o) for i, (r, o) in enumerate([("P19", "Oslo"), ("P20", "Oslo"), ("P19", "Rome")])
    )
    assert [born, died] == facts.twins([born, other, died])
    alone = facts.Fact("3", "P19", "Bo", "Oslo")
    assert [born, died] == facts.chosen([alone, born, died], 2)


def test_what_a_model_knows_is_what_single_prompts_say(monkeypatch):
    """In batches of prompts of other lengths as one by one; an untrained model knows some by chance."""
    monkeypatch.setattr(facts, "LIKELIEST", 150)
    model, words, patterns = gpt(), tokenizer(), facts.load_patterns()
    some = facts.load_facts()[::40]
    expected = []
    for fact in some:
        prompt = fact.asked(patterns[fact.relation][0])
        with torch.inference_mode():
            logits = model(torch.tensor([words(prompt)["input_ids"]])).logits[0, -1]
        first = words(f" {fact.object}")["input_ids"][0]
        expected.append(int((logits > logits[first]).sum()) < 150)
    assert expected == facts.known(model, words, some, patterns)
    assert {True, False} == set(expected)
