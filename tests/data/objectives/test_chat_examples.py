"""Conversations as rows: answers and their ends are scored, several share a row, and what is too long is cut."""

import itertools
from typing import Any

import numpy as np
import pytest

from lm.data.objectives.chat import ChatExamples
from lm.data.store import MemoryStore
from lm.errors import UserError

EOS = 99


def store(*conversations: list[list[int]]) -> MemoryStore:
    """Conversations of parts, what is read and what is answered in turn; the store ends each of them."""
    return MemoryStore(
        [np.array([*(token for part in parts for token in part), EOS]) for parts in conversations],
        part_lengths=[[len(part) for part in parts] for parts in conversations],
    )


def examples(*conversations: list[list[int]], seq_len: int = 8, **options: Any) -> ChatExamples:
    return ChatExamples(store(*conversations), seq_len, **({"packed": False} | options))


def rows(made: ChatExamples) -> list[list[tuple[int, int, float]]]:
    """Of each row and each conversation in it: (input, target, weight)."""
    batch = made.batch(np.arange(len(made)))
    found = []
    for r in range(len(made)):
        segments = batch["segments"][r]
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            assert batch["positions"][r, where].tolist() == list(range(where.sum()))
            columns = (batch[name][r, where].tolist() for name in ("tokens", "targets", "weights"))
            found.append(list(zip(*columns)))
        assert not any(batch[name][r, segments == 0].any() for name in ("tokens", "targets", "weights", "positions"))
    return found


def test_answers_and_their_ends_are_scored() -> None:
    two_turns = [[1, 2, 3], [4, 5], [6, 7], [8]]
    assert rows(examples(two_turns)) == [[(1, 2, 0), (2, 3, 0), (3, 4, 1), (4, 5, 1), (5, 6, 0), (6, 7, 0), (7, 8, 1)]]


def brute_force(parts: list[list[int]], seq_len: int) -> list[tuple[int, int, float]]:
    """One conversation, token by token."""
    tokens = [(token, number, place) for number, part in enumerate(parts) for place, token in enumerate(part)]
    kept = tokens if len(tokens) <= seq_len + 1 else [tokens[0], *tokens[-seq_len:]]
    lost = set(tokens) - set(kept)
    broken = {number for _, number, _ in lost}
    return [(a[0], b[0], float(b[1] % 2 == 1 and b[1] not in broken)) for a, b in itertools.pairwise(kept)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seq_len", [5, 9, 30])
def test_rows_are_those_of_a_plain_loop(packed: bool, seq_len: int) -> None:
    rng = np.random.default_rng(seq_len)
    token = iter(range(1, 10**6))  # all different, so that a conversation is known by any of its tokens

    def part(low: int, high: int) -> list[int]:
        return [next(token) for _ in range(rng.integers(low, high))]

    made = [[p for _ in range(rng.integers(1, 4)) for p in (part(0, 6), part(1, 5))] for _ in range(40)]
    made = [parts if parts[0] else [[next(token)], *parts[1:]] for parts in made]
    found = examples(*made, seq_len=seq_len, packed=packed)
    wanted = [brute_force(parts, seq_len) for parts in made]
    assert sorted(rows(found)) == sorted(wanted)
    assert found.cut == sum(sum(map(len, parts)) > seq_len + 1 for parts in made)
    assert found.left_out == 0
    if not packed:
        assert rows(found) == wanted
        assert [found.documents(i).tolist() for i in range(40)] == [[i] for i in range(40)]
    else:
        assert sorted(d for i in range(len(found)) for d in found.documents(i)) == list(range(40))
        assert len(found) < 40
        ordinals = found.documents(0)
        assert rows(found)[: len(ordinals)] == [wanted[d] for d in ordinals]


def test_padding_scores_nothing() -> None:
    batch = examples([[1], [2, 3]], [[4], [5]]).batch(np.array([1, -1]))
    assert batch["weights"].sum(axis=1).tolist() == [1, 0]
    assert not batch["segments"][1].any()


def test_a_response_longer_than_the_row_stops_or_is_left_out() -> None:
    made = store([[1], [2, 3, 4, 5]], [[1], [2, 3, 4]], [[1, 1, 1, 1], [2, 3, 4, 5]])
    with pytest.raises(
        UserError, match=r"last response of 0 has 4 tokens and a row 3 .* 2 of 3 .* --data.on-error skip"
    ):
        ChatExamples(made, 3, packed=False)
    kept = ChatExamples(made, 3, packed=True, on_error="skip")
    assert (len(kept), kept.left_out, kept.cut) == (1, 2, 0)
    assert kept.documents(0).tolist() == [1]
    with pytest.raises(UserError, match="no conversation has a last response of at most 2 tokens"):
        ChatExamples(made, 2, packed=True, on_error="skip")


def test_documents_that_are_no_conversations() -> None:
    with pytest.raises(UserError, match="have no parts"):
        ChatExamples(MemoryStore([np.array([1, EOS])]), 8, packed=False)
    with pytest.raises(UserError, match=r"1 has 3 parts.*data\.chat\.template"):
        examples([[1], [2]], [[1], [2], [3]])
