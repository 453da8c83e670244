"""Votes on groups of pictures: what they say, and that none is lost or counted twice."""

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pixrl.errors import CheckpointError, InputError, RunError
from pixrl.rewards.votes.groups import GroupVotes, VotedPicture, preferred, rewards_of, write_pairs

PICTURES = [VotedPicture(f"{name}.png", seed, 0) for seed, name in enumerate("abc")]
A, B, C = [one.file for one in PICTURES]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with GroupVotes(tmp_path / "votes.sqlite", make=True) as ballots:
        ballots.add(0, {0: ("an owl", PICTURES), 1: ("a cat", PICTURES[:2])})
    return tmp_path / "votes.sqlite"


def test_rewards() -> None:
    assert rewards_of([0, 1, 2]) == [1, 0, -1]
    assert rewards_of([1, 0, 1]) == [-0.5, 1, -0.5]  # best of three
    assert rewards_of([0, 1]) == [1, -1] and rewards_of([0, 0]) == [0, 0]


def test_a_vote_is_kept_once_and_can_be_taken_back_until_it_is_learned_from(file: Path) -> None:
    with GroupVotes(file) as one, GroupVotes(file) as other:
        assert one.vote(1, [B]) and not other.vote(1, [A])
        assert other.all()[0].ranks == (1, 0, 1)
        assert other.undo(1) and not other.undo(1) and one.all()[0].ranks is None
        assert other.vote(1, [A, B, C])
        assert one.learn(0, [0, 1], 0) is None  # the cat has no vote yet
        assert one.vote(2, [])
        assert one.learn(0, [0, 1], 60) is None  # it may be taken back still
        learned = one.learn(0, [0, 1], 0)
        assert learned is not None and [ballot.ranks for ballot in learned] == [(0, 1, 2), (0, 0)]
        assert one.learn(0, [0, 1], 60) == [ballot for ballot in one.all() if ballot.learned]
        assert not one.undo(1) and one.waiting() == []


def test_groups_that_are_drawn_again_keep_their_votes_only_if_their_pictures_are_the_same(file: Path) -> None:
    with GroupVotes(file) as ballots:
        ballots.vote(1, [A])
        ballots.vote(2, [B])
        ballots.learn(0, [0, 1], 0)
        ballots.add(0, {0: ("an owl", PICTURES), 1: ("a cat", PICTURES[1:])})
        assert [ballot.ranks for ballot in ballots.all()] == [(0, 1, 1), None]
        assert [ballot.number for ballot in ballots.waiting()] == [2]


def test_pairs(file: Path) -> None:
    with GroupVotes(file) as ballots:
        ballots.vote(1, [B])
        rows = preferred(ballots.all())
        assert write_pairs(ballots).read_text() == ""  # nothing is learned from yet
        ballots.learn(0, [0], 0)
        assert [json.loads(line) for line in write_pairs(ballots).read_text().splitlines()] == rows
    assert [(row["winner"], row["loser"]) for row in rows] == [(B, A), (B, C)]
    assert rows[0]["prompt"] == "an owl" and (rows[1]["winner_seed"], rows[1]["loser_seed"]) == (1, 2)


@pytest.mark.parametrize("best", [["x.png"], [A, A], [A, "x.png"]])
def test_bad_votes(file: Path, best: list[str]) -> None:
    with GroupVotes(file) as ballots:
        with pytest.raises(InputError, match="not one of this group"):
            ballots.vote(1, best)
        with pytest.raises(InputError, match="not one of this run"):
            ballots.vote(9, [A])
        with pytest.raises(InputError, match="not one of this group"):
            ballots.vote(2, [C])
        assert all(ballot.ranks is None for ballot in ballots.all())


def test_what_is_no_file_of_votes(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no database, but long enough to be taken for one" * 20)
    with pytest.raises(CheckpointError, match="no file of votes, or damaged"):
        GroupVotes(tmp_path / "x")


def test_a_full_disk_keeps_what_was_voted(file: Path) -> None:
    with GroupVotes(file) as ballots:
        assert ballots.vote(2, [B])
        pages = ballots._base.execute("PRAGMA page_count").fetchone()[0]
        ballots._base.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(RunError, match=r"votes\.sqlite cannot be written .*earlier votes are kept"):
            ballots.add(1, {0: ("long " * 4000, PICTURES)})
        assert [ballot.ranks for ballot in ballots.all()] == [None, (1, 0)]
        ballots._base.execute("PRAGMA max_page_count = 100000")
        assert ballots.vote(1, [A])


def _vote_on(path: Path, offset: int, answers: Connection) -> None:
    with GroupVotes(path) as ballots:
        for number in range(1 + offset, 1001, 2):
            ballots.vote(number, [A])
            answers.send(number)


def test_two_voters_at_once_of_whom_one_is_killed(tmp_path: Path) -> None:
    """Every vote that was answered is there, with real processes."""
    path = tmp_path / "votes.sqlite"
    with GroupVotes(path, make=True) as ballots:
        ballots.add(0, dict.fromkeys(range(1000), ("an owl", PICTURES[:2])))
    context = multiprocessing.get_context("spawn")
    ends, voters = [], []
    for offset in range(2):
        mine, theirs = context.Pipe(duplex=False)
        voters.append(context.Process(target=_vote_on, args=(path, offset, theirs)))
        voters[-1].start()
        theirs.close()
        ends.append(mine)
    answered = [[ends[offset].recv() for _ in range(20)] for offset in range(2)]
    pid = voters[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for offset in range(2):
        try:
            while True:
                answered[offset].append(ends[offset].recv())
        except EOFError:
            voters[offset].join()
    assert voters[0].exitcode == 0 and len(answered[0]) == 500
    with GroupVotes(path) as ballots:
        kept = {ballot.number for ballot in ballots.all() if ballot.ranks == (0, 1)}
    assert set(answered[0]) | set(answered[1]) <= kept
    assert len(kept - set(answered[0]) - set(answered[1])) <= 1  # written, but killed before it was said
