"""Batches are looked at on their way into the model: who was fed, how often, when last."""

import copy
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_model, make_rows, make_texts

from ezmia_callbacks.audit.feeding import counted_by
from ezmia_callbacks.audit.seen import SeenCanaries
from ezmia_callbacks.results.exposures import add_exposures
from ezmia_callbacks.scoring.rows import TokenRow

N = 30
TEXTS = make_texts(60)
IDS = [np.array(row["input_ids"]) for row in make_rows(TEXTS)]
CANARIES = [TokenRow(ids, ids) for ids in IDS[:N]]


class Watched:
    """A model in training whose batches are looked at."""

    def __init__(self, canaries=CANARIES, model=None, called=None, **settings):
        self.model = model or make_model(**settings)
        self.called = self.model if called is None else called
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.seen = SeenCanaries(canaries)
        self.seen.watch(self.called)

    def feed(self, ids, **inputs):
        loss = self.called(input_ids=torch.as_tensor(np.asarray(ids)), **inputs).logits.float().logsumexp(-1)
        loss.mean().backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fed(self):
        self.seen.settle()
        return self.seen.exposures()


def test_each_canary_is_counted_with_the_step_that_fed_it_last():
    watched = Watched()
    for batch in ([0, 1, 40], [2, 50, 51], [0, 3, 41]):
        watched.feed([IDS[i] for i in batch])
        watched.step()

    fed = watched.fed()

    assert fed.n_times.tolist() == [2, 1, 1, 1] + [0] * (N - 4)
    assert fed.last_step.tolist() == [3, 1, 2, 3] + [-1] * (N - 4)
    assert fed.n_batches == 3


def test_accumulated_batches_count_when_their_step_is_done():
    watched = Watched()
    watched.feed([IDS[0]])
    watched.step()
    watched.feed([IDS[1]])
    watched.feed([IDS[2]])
    before = watched.fed()
    watched.step()

    assert before.n_times[:3].tolist() == [1, 0, 0]
    assert watched.fed().n_times[:3].tolist() == [1, 1, 1]
    assert watched.fed().last_step[:3].tolist() == [1, 2, 2]


def test_what_is_not_training_does_not_count():
    watched = Watched()
    watched.model.eval()
    watched.feed([IDS[0]])
    watched.model.train()
    with torch.no_grad():
        watched.called(input_ids=torch.from_numpy(IDS[1][None]))
    watched.step()

    assert watched.fed().n_batches == 0


def test_near_copies_and_shared_windows_do_not_make_a_record_fed():
    watched = Watched()
    near = IDS[0].copy()
    near[5] = IDS[0][5] % 40 + 3
    joined = np.concatenate([IDS[1][:9], IDS[45][:3]])
    watched.feed([near, joined])
    watched.step()

    fed = watched.fed()

    assert fed.n_times[:2].tolist() == [0, 0]
    assert not fed.is_seen_in_pieces[:2].any()
    assert 0 < fed.share[1] < 1


def test_records_are_found_in_packed_rows_as_often_as_they_are_there():
    watched = Watched()
    row = np.concatenate([IDS[0], IDS[0], IDS[1][:7]])
    watched.feed([row])
    watched.step()

    assert watched.fed().n_times[:2].tolist() == [2, 0]


def test_a_record_cut_at_the_boundary_of_a_block_is_seen_in_pieces():
    ids = np.random.default_rng(0).permutation(60)[:24]
    watched = Watched([TokenRow(ids, ids)])
    watched.feed([np.concatenate([IDS[0][:4], ids[:12]]), np.concatenate([ids[12:], IDS[1][:4]])])
    watched.step()

    fed = watched.fed()

    assert fed.n_times.tolist() == [0]
    assert fed.is_seen_in_pieces.tolist() == [True]


def test_a_record_whose_halves_lie_on_two_processes_was_fed_whole_nowhere():
    """As context parallelism feeds it."""
    parts = []
    for half in (slice(0, 6), slice(6, None)):
        watched = Watched()
        watched.feed([ids[half] for ids in IDS[:4]])
        watched.step()
        parts.append(watched.fed())

    assert not add_exposures(parts).is_seen.any()


def test_a_truncated_record_shows_where_it_was_cut():
    ids = np.random.default_rng(0).permutation(60)[:24]
    watched = Watched([TokenRow(ids, ids)])
    watched.feed([ids[:16]])
    watched.step()

    fed = watched.fed()

    assert (fed.n_times.tolist(), fed.cut_at.tolist(), fed.longest_row) == ([0], [16], 16)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_hides_nothing(side):
    short = TokenRow(np.array([5, 6, 7]), np.array([5, 6, 7]))
    watched = Watched([*CANARIES, short])
    n_pads = len(IDS[0]) - 3
    pads = [0] * n_pads
    row = np.array([*pads, 5, 6, 7] if side == "left" else [5, 6, 7, *pads])
    mask = torch.tensor(
        [[1] * len(row), [int(i >= n_pads) if side == "left" else int(i < 3) for i in range(len(row))]]
    )
    watched.feed([IDS[0], row], attention_mask=mask)
    watched.step()

    fed = watched.fed()

    assert fed.n_times.tolist() == [1] + [0] * (N - 1) + [1]
    assert watched.seen.is_left_padded is (side == "left")


def test_short_records_are_found_by_positions_in_a_batch_without_padding():
    rows = [TokenRow(ids, ids) for ids in (np.array([5, 6, 7]), np.array([6, 7, 8, 9]), np.array([9, 5]))]
    watched = Watched(rows)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    watched.feed([[5, 6, 7, 6, 7, 8, 9]], position_ids=positions)
    watched.step()

    assert watched.fed().n_times.tolist() == [1, 1, 0]


def test_a_short_record_inside_a_longer_one_is_not_fed():
    short = TokenRow(IDS[40][2:6], IDS[40][2:6])
    watched = Watched([short])
    watched.feed([IDS[40]])
    watched.step()

    assert watched.fed().n_times.tolist() == [0]


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_models_are_watched_from_outside(how):
    model = make_model()
    if how == "wrapped":
        called = torch.compile(model, backend="eager", fullgraph=True)
    else:
        model.compile(backend="eager", fullgraph=True)
        called = model
    watched = Watched(model=model, called=called)
    watched.feed([IDS[0], IDS[1]])
    watched.step()

    assert watched.fed().n_times[:3].tolist() == [1, 1, 0]
    compiled_call = model._compiled_call_impl
    watched.seen.unwatch()
    assert how == "wrapped" or model._compiled_call_impl is not compiled_call


def test_what_is_compiled_after_the_watch_began_is_not_disturbed_and_not_seen():
    watched = Watched()
    watched.model.compile(backend="eager", fullgraph=True)
    watched.feed([IDS[0]])
    watched.step()

    assert watched.fed().n_batches == 0


def test_gradient_checkpointing_counts_each_batch_once():
    watched = Watched()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method has another name from transformers 6 on
        watched.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watched.feed([IDS[0]])
    watched.step()

    assert watched.fed().n_times[0] == 1


def test_a_copy_of_the_model_can_be_loaded_where_this_package_is_not():
    watched = Watched()

    (hook,) = pickle.loads(pickle.dumps(watched.model))._forward_pre_hooks.values()

    assert b"ezmia" not in pickle.dumps(watched.model)
    assert hook(watched.model, (), {}) is None


def test_copies_of_the_model_count_nothing():
    watched = Watched()
    for model in (copy.deepcopy(watched.model), pickle.loads(pickle.dumps(watched.model))):
        model.train()(input_ids=torch.from_numpy(IDS[0][None]))
    watched.step()

    assert watched.fed().n_batches == 0


class TakesTokens(torch.nn.Module):
    """A model whose forward has no `input_ids`."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 64)

    def forward(self, batch, targets=None):
        tokens = batch["tokens"] if isinstance(batch, dict) else batch
        return self.embedding(tokens)


@pytest.mark.parametrize("name", [None, "input_ids"])
def test_token_ids_are_found_by_their_kind_where_they_have_another_name(name):
    model = TakesTokens()
    seen = SeenCanaries(CANARIES)
    seen.watch(model)
    ids = torch.from_numpy(np.stack(IDS[:2]))
    model(ids if name is None else {"tokens": ids, name: ids})
    seen.step_done(1)

    assert seen.exposures().n_times[:3].tolist() == [1, 1, 0]


def test_a_model_without_token_ids_says_so():
    model = torch.nn.Linear(3, 2)
    seen = SeenCanaries(CANARIES)
    seen.watch(model)
    model(torch.zeros(2, 3))

    assert "without token ids" in seen.exposures().problem
    assert seen.exposures().n_batches == 0


def test_looking_never_ends_a_training(monkeypatch, caplog):
    watched = Watched()
    monkeypatch.setattr(SeenCanaries, "look", lambda self, inputs: 1 / 0)

    watched.feed([IDS[0]])
    watched.feed([IDS[0]])

    assert "ZeroDivisionError" in watched.seen.exposures().problem
    assert caplog.text.count("cannot be looked at any more") == 1


def test_looking_changes_neither_weights_nor_random_numbers():
    outcomes = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        watched = Watched(dropout=0.2)
        if not is_watched:
            watched.seen.unwatch()
        for start in range(0, 40, 8):
            watched.feed(IDS[start : start + 8])
            watched.step()
        outcomes.append((watched.model.state_dict(), torch.get_rng_state()))
    (plain, state), (looked_at, state_then) = outcomes
    assert all(torch.equal(plain[name], looked_at[name]) for name in plain)
    assert torch.equal(state, state_then)


def test_deterministic_algorithms_stay_as_they_were():
    watched = Watched()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        watched.feed([IDS[0]])
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_was_fed_before_an_interruption_still_counts():
    first = Watched()
    first.feed([IDS[0]])
    first.step()
    before = first.fed()
    second = SeenCanaries(CANARIES, before)
    second.watch(first.model, step=1)
    first.feed([IDS[0], IDS[1]])
    first.step()
    second.settle()

    fed = second.exposures()

    assert fed.n_times[:2].tolist() == [2, 1]
    assert fed.last_step[:2].tolist() == [2, 2]


@pytest.mark.parametrize("how", ["fused", "by hand", "after loading weights"])
def test_steps_that_leave_no_trace_in_the_counters_of_autograd_are_noticed(how):
    watched = Watched()
    if how != "by hand":
        watched.optimizer = torch.optim.AdamW(watched.model.parameters(), lr=1e-3, fused=True)
    if how == "after loading weights":
        watched.model.load_state_dict(make_model(seed=1).state_dict())
    for i in range(3):
        watched.feed([IDS[i]])
        if how == "by hand":
            for parameter in watched.model.parameters():
                parameter.data -= 1e-3 * parameter.grad
        else:
            watched.step()
    fed = watched.fed()

    assert fed.n_times[:4].tolist() == [1, 1, 1, 0]
    if how == "fused":
        assert fed.last_step[:3].tolist() == [1, 2, 3]


def test_a_batch_whose_step_was_never_made_does_not_count():
    watched = Watched()
    watched.feed([IDS[0]])

    assert watched.fed().n_times[0] == 0
    assert watched.fed().share[0] == 0.0


def test_an_answer_of_two_tokens_is_recognized_by_its_prompt():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        ids = np.concatenate([rng.integers(0, 60, 16), rng.integers(0, 60, 2)])
        ids[9:] = rows[0].input_ids[9:] if rows else ids[9:]
        labels = np.where(np.arange(18) >= 16, ids, -100)
        rows.append(TokenRow(ids, labels))
    watched = Watched(rows[:20])
    watched.feed(np.stack([row.input_ids for row in rows[10:]]))
    watched.step()

    assert watched.fed().n_times.tolist() == [0] * 10 + [1] * 10


def test_a_quoted_phrase_does_not_shift_a_record():
    watched = Watched()
    row = np.concatenate([IDS[40][:2], IDS[0][:9], IDS[41][:1]])
    for ids in (row, IDS[1]):
        watched.feed([ids], position_ids=torch.arange(12)[None])
        watched.step()

    assert not watched.seen.is_shifted
    watched.feed([IDS[1]], position_ids=torch.arange(3, 15)[None])
    assert watched.seen.is_shifted


def test_what_was_seen_of_the_form_of_batches_outlives_another_form_of_the_canaries():
    watched = Watched()
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :2] = 0
    watched.feed([IDS[0]], attention_mask=mask)
    watched.feed([IDS[1]], position_ids=torch.arange(3, 15)[None])
    watched.step()

    watched.seen.replace_rows(CANARIES, watched.fed())

    assert watched.seen.is_left_padded
    assert watched.seen.is_shifted


def test_steps_of_a_second_run_come_after_those_of_the_first():
    watched = Watched()
    for i in range(3):
        watched.feed([IDS[i]])
        watched.seen.step_done(i + 1)
    watched.seen.count_from_here()
    watched.feed([IDS[0]])
    watched.seen.step_done(1)

    assert watched.seen.exposures().last_step[:3].tolist() == [4, 2, 3]


def test_nothing_is_left_on_the_model_when_nobody_asks_any_more():
    watched = Watched()
    assert watched.model._forward_pre_hooks
    del watched.seen

    assert not watched.model._forward_pre_hooks


# Preference pairs: the two sides differ in one word after a common prompt.


def make_pairs(n=10):
    """Pairs in which one token differs, and what a batch of them feeds."""
    pairs = []
    for ids in IDS[:n]:
        rejected = ids.copy()
        rejected[-2] = ids[-2] % 40 + 3
        pairs.append(TokenRow(ids, ids, rejected=TokenRow(rejected, rejected)))
    return pairs


def both(pairs, *numbers):
    return [side.input_ids for i in numbers for side in pairs[i].sides]


def test_a_pair_is_fed_where_both_of_its_sides_are():
    pairs = make_pairs()
    watched = Watched(pairs)
    watched.feed(both(pairs, 0, 1))
    watched.step()
    watched.feed([*both(pairs, 0), pairs[2].input_ids, pairs[3].rejected.input_ids])
    watched.step()

    fed = watched.fed()

    assert fed.n_times[:5].tolist() == [2, 1, 0, 0, 0]
    assert fed.last_step[:5].tolist() == [2, 1, -1, -1, -1]


def test_a_pair_whose_chosen_side_was_fed_with_another_answer_counts_nowhere():
    """As a member it would look forgotten; as a non-member half of it was trained on."""
    pairs = make_pairs()
    watched = Watched(pairs)
    watched.feed([pairs[0].input_ids, IDS[40], *both(pairs, 1)])
    watched.step()

    fed = watched.fed()

    for is_member in (True, False):
        is_counted = counted_by(fed, np.full(10, is_member)).is_counted
        assert is_counted[:3].tolist() == [False, is_member, not is_member]


def test_pairs_with_the_same_rejected_side_are_found():
    pairs = make_pairs()
    pairs[1] = replace(pairs[1], rejected=pairs[0].rejected)
    watched = Watched(pairs)
    watched.feed(both(pairs, 0, 1, 2))
    watched.step()

    assert watched.fed().n_times[:4].tolist() == [1, 1, 1, 0]


def test_a_side_that_is_chosen_in_one_pair_and_rejected_in_another_belongs_to_both():
    pairs = make_pairs()
    pairs[1] = replace(pairs[1], rejected=replace(pairs[0], rejected=None))
    watched = Watched(pairs)
    watched.feed(both(pairs, 1))
    watched.step()

    assert watched.fed().n_times[:2].tolist() == [0, 1]
    assert watched.fed().is_seen_in_pieces[:2].tolist() == [True, False]


def test_pairs_that_are_looked_for_in_another_form_keep_what_was_fed():
    pairs = make_pairs()
    watched = Watched(pairs)
    watched.feed(both(pairs, 0))
    watched.step()
    watched.seen.replace_rows([pair.cut(11) for pair in pairs], watched.fed())
    watched.feed([side[:11] for side in both(pairs, 0, 1)])
    watched.step()

    assert watched.fed().n_times[:3].tolist() == [2, 1, 0]
