"""Beam search decides as transformers' `generate` does, for a small random network."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from worker.engine.beam_candidates import BeamCandidates, RunningSearch
from worker.engine.beam_search import rearranged
from worker.engine.generation_rules import GenerationRules
from worker.engine.row import Row, Sampling, Tokens, TokenScore

VOCABULARY = 13
PROMPT = (1, 7, 3)
#: A token that no answer contains.
FORBIDDEN = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> LlamaForCausalLM:
    torch.manual_seed(5)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.6,
        )
    )
    return network.eval()


@torch.inference_mode()
def searched(network: LlamaForCausalLM, sampling: Sampling, rules: GenerationRules) -> list[tuple[TokenScore, ...]]:
    """The answers of a search that computes each beam anew at each step."""
    running = RunningSearch(Row(Tokens(PROMPT), sampling), 0, rules, CPU)
    candidates, search = BeamCandidates([FORBIDDEN], CPU), running.search
    prompts = [PROMPT]
    while not search.is_done:
        logits = network(torch.tensor(prompts)).logits[:, -1]
        search.advance(candidates.find(logits, {running: range(len(prompts))})[running], is_cut=False)
        prompts = [(*PROMPT, *(token.id for token in beam.tokens)) for beam in search.running]
        running.slots = list(range(len(prompts)))
    return search.answers


def random_case(rng: random.Random) -> tuple[Sampling, Mapping[str, Any], Mapping[str, Any]]:
    """What a row asks for, and the checkpoint's rules of scores and of beams."""
    beams = rng.randint(2, 5)
    sampling = Sampling(
        max_new_tokens=rng.randint(1, 12),
        num_beams=beams,
        answers=rng.randint(1, beams),
        logprobs=rng.choice([None, 0, 2]),
        eos_ids=frozenset(rng.sample([2, 5, 6], rng.randint(1, 3))),
    )
    beam_rules = {"length_penalty": rng.choice([0.0, 0.3, 1.0, 2.0, -1.0])}
    beam_rules |= {"early_stopping": rng.choice([False, True, "never"])}
    beam_rules |= {"renormalize_logits": True} if rng.random() < 0.3 else {}
    score_rules = rng.choice([{}, {}, {"min_new_tokens": 3}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.5}])
    return sampling, score_rules, beam_rules


@pytest.mark.parametrize("seed", range(60))
def test_the_answers_are_those_of_generate(network: LlamaForCausalLM, seed: int) -> None:
    sampling, score_rules, beam_rules = random_case(random.Random(seed))
    expected = network.generate(
        torch.tensor([PROMPT]),
        do_sample=False,
        num_beams=sampling.num_beams,
        num_return_sequences=sampling.answers,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(sampling.eos_ids),
        pad_token_id=0,
        bad_words_ids=[[FORBIDDEN]],
        **score_rules,
        **beam_rules,
    )[:, len(PROMPT) :].tolist()
    found = searched(network, sampling, GenerationRules(scores=score_rules, beams=beam_rules))
    assert [[token.id for token in tokens] for tokens in found] == [
        ids[: next((n + 1 for n, id in enumerate(ids) if id in sampling.eos_ids), len(ids))] for ids in expected
    ]
    assert all(len(token.top) == (sampling.logprobs or 0) for tokens in found for token in tokens)


def test_a_search_that_is_cut_answers_the_best_so_far(network: LlamaForCausalLM) -> None:
    sampling = Sampling(max_new_tokens=12, num_beams=3, eos_ids=frozenset())
    running = RunningSearch(Row(Tokens(PROMPT), sampling), 0, GenerationRules(), CPU)
    candidates = BeamCandidates([], CPU)
    with torch.inference_mode():
        logits = network(torch.tensor([PROMPT])).logits[:, -1]
        found = candidates.find(logits, {running: [0]})[running]
    running.search.advance(found, is_cut=True)
    assert running.search.is_done
    ((token,),) = running.search.answers
    assert token.id == int(logits.argmax())
    assert token.logprob == pytest.approx(float(logits[0].log_softmax(dim=-1).max()), abs=1e-4)


def test_searches_of_several_kinds_find_their_own_candidates() -> None:
    logits = torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(1))
    asked = [
        Sampling(5, num_beams=2, logprobs=1),
        Sampling(5, num_beams=3),
        Sampling(5, num_beams=2, logprobs=1, repetition_penalty=1.5),
    ]
    searches = [RunningSearch(Row(Tokens(PROMPT), sampling), 0, GenerationRules(), CPU) for sampling in asked]
    candidates = BeamCandidates([FORBIDDEN], CPU)
    places = {searches[0]: [6], searches[1]: [2], searches[2]: [4]}
    together = candidates.find(logits, places)
    assert list(together.values()) == [candidates.find(logits, {search: places[search]})[search] for search in together]
    assert len({tuple(found) for found in together.values()}) == 3


def test_a_search_whose_numbers_overflow_has_no_candidates() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[1, 5] = torch.nan
    searches = [
        RunningSearch(Row(Tokens(PROMPT), Sampling(5, num_beams=2)), 0, GenerationRules(), CPU) for _ in range(2)
    ]
    found = BeamCandidates([], CPU).find(logits, {searches[0]: [0], searches[1]: [1]})
    assert found[searches[0]]
    assert not found[searches[1]]


@pytest.mark.parametrize("seed", range(20))
def test_beams_stay_where_they_are_if_they_can(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(2, 6)
    slots = rng.sample(range(20), count)
    parents = [rng.randrange(count) for _ in slots]
    content = {slot: f"beam {number}" for number, slot in enumerate(slots)}
    found, moves = rearranged(slots, parents)
    assert sorted(found) == sorted(slots)
    assert not {source for source, _ in moves} & {target for _, target in moves}
    for source, target in moves:
        content[target] = content[source]
    assert [content[slot] for slot in found] == [f"beam {parent}" for parent in parents]
    # As few as possible.
    assert len(moves) == count - len(set(parents))
