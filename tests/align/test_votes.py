"""Runs that learn from votes: of a simulated voter, and of people who are asked through the run's folder."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.guard import JUDGE
from benchmarks.guard import recipe as toy_recipe
from scipy import stats

import pixrl
from pixrl import api
from pixrl.errors import ConfigError, ServiceError
from pixrl.jobs import align as align_job
from pixrl.rewards.base import Reward
from pixrl.rewards.set import RewardSet
from pixrl.rewards.settings import RewardSetting
from pixrl.rewards.votes.groups import FOLDER, VOTES, GroupVotes, VotedGroup
from pixrl.rewards.votes.reward import VotesReward
from pixrl.runs.config import AlignConfig
from pixrl.runs.folder import RunFolder
from pixrl.runs.reading import sample_scores
from pixrl.types import Origin, RewardBatch, Scores
from tests.align.parts import final, recipe, same

TASTE = {
    "name": "brightness",
    "kind": "python",
    "held_out": True,
    "options": {"function": f"{JUDGE}:brightness"},
}


def votes(**options: Any) -> list[dict[str, Any]]:
    return [{"name": "votes", "options": {"undo_seconds": 0, **options}}, TASTE]


def simulated(wrong: float = 0.0, seed: int = 0) -> dict[str, Any]:
    return {"simulated": {"taste": "brightness", "wrong": wrong, "seed": seed}}


class Brightness(Reward):
    name = "brightness"

    def score(self, batch: RewardBatch) -> Scores:
        return Scores(batch.images_BCHW.mean(dim=(1, 2, 3)), (None,) * len(batch.prompts))


def batch_of(groups: int, per_group: int, step: int = 0) -> RewardBatch:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(groups * per_group, 3, 4, 4, generator=generator)
    origins = [Origin(step, n // per_group, n, 0) for n in range(groups * per_group)]
    return RewardBatch(images, ["an owl"] * len(images), origins=origins)


def vote_on_all(file: Path, stop: threading.Event, best: int, seen: list[int]) -> None:
    """A person who finds the picture at one place of each group the best."""
    while not stop.wait(0.02):
        if file.is_file():
            with GroupVotes(file, make=True) as ballots:
                for ballot in ballots.waiting():
                    if ballot.ranks is None and ballots.vote(ballot.number, [ballot.pictures[best].file]):
                        seen.append(ballot.number)


def all_votes(run: Path) -> list[VotedGroup]:
    with GroupVotes(run / FOLDER / VOTES) as ballots:
        return ballots.all()


@pytest.mark.parametrize(("ask", "wanted"), [("best", [-0.5, -0.5, 1.0]), ("order", [-1.0, 0.0, 1.0])])
def test_what_a_vote_is_worth(ask: str, wanted: list[float], tmp_path: Path) -> None:
    reward = VotesReward(ask, simulated={"taste": "brightness"})
    reward.attend(tmp_path, {"brightness": Brightness()}, print)
    images = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None].expand(-1, 3, 4, 4)
    batch = RewardBatch(images, ["an owl"] * 3, origins=[Origin(0, 0, n, 0) for n in range(3)])
    assert reward.score(batch).values_B.tolist() == wanted
    reward.leave()


def test_a_simulated_voter_errs_as_often_as_it_was_told_and_always_in_the_same_places(tmp_path: Path) -> None:
    batch = batch_of(150, 3)
    right_P = batch.images_BCHW.mean(dim=(1, 2, 3)).view(-1, 3).argmax(dim=1)
    chosen = []
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        (tmp_path / folder).mkdir()
        reward = VotesReward(simulated={"taste": "brightness", "wrong": 0.2, "seed": seed})
        reward.attend(tmp_path / folder, {"brightness": Brightness()}, print)
        chosen.append(reward.score(batch).values_B.view(-1, 3).argmax(dim=1))
        reward.leave()
    wrong = float((chosen[0] != right_P).float().mean())
    assert abs(wrong - 0.2) < 4 * (0.2 * 0.8 / 150) ** 0.5  # four standard errors
    assert chosen[0].equal(chosen[1]) and not chosen[0].equal(chosen[2])


def test_people_are_waited_for_and_asked_again_only_about_what_has_no_vote(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    """A run that is killed while it waits goes on as one that never was."""
    config = AlignConfig.model_validate(recipe(sd3_folder, prompt_file, rewards=votes(), steps=2))

    class Killed(Exception):
        pass

    def vote_once_and_die(text: str) -> None:
        if "wait for votes" in text:
            with GroupVotes(tmp_path / "run" / FOLDER / VOTES) as ballots:
                first = ballots.waiting()[0]
                ballots.vote(first.number, [first.pictures[1].file])
            raise KeyboardInterrupt

    class Monitor(align_job.Silent):
        def say(self, text: str) -> None:
            vote_once_and_die(text)

    with pytest.raises(KeyboardInterrupt):
        align_job.start(config, tmp_path / "run", monitor=Monitor())
    assert [ballot.ranks for ballot in all_votes(tmp_path / "run")] == [(1, 0, 1), None]
    runs, asked = [tmp_path / "run", tmp_path / "unbroken"], []
    for run in runs:
        stop, seen = threading.Event(), list[int]()
        person = threading.Thread(target=vote_on_all, args=(run / FOLDER / VOTES, stop, 1, seen))
        person.start()
        try:
            api.resume(run, live=False) if run.exists() else align_job.start(config, run)
        finally:
            stop.set()
            person.join()
        asked.append(seen)
    assert asked == [[2, 3, 4], [1, 2, 3, 4]]
    same(final(runs[0]), final(runs[1]))
    rows = RunFolder.open(runs[0]).manifest()
    assert [row.scores["votes"] for row in rows] == [-0.5, 1, -0.5] * 4
    assert all(ballot.learned for ballot in all_votes(runs[0]))


def test_pairs_of_the_votes_train_offline(tmp_path: Path, sd3_folder: Path, prompt_file: Path) -> None:
    voted = pixrl.align(
        recipe(sd3_folder, prompt_file, rewards=votes(**simulated()), steps=1), out=tmp_path / "run"
    )
    assert all("votes/mean" not in row and row["brightness/mean"] for row in voted.evaluations)
    pairs = voted.run / FOLDER / "pairs.jsonl"
    offline = recipe(sd3_folder, pairs, loss={"kind": "dpo"}, steps=1)
    offline["prompts"]["per_step"] = 1
    offline["evaluation"]["source"] = str(prompt_file)
    for unused in ("exploration", "sampling"):
        offline.pop(unused)
    assert pixrl.align(offline, out=tmp_path / "offline").metrics


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ask": "bset"}, "Did you mean 'best'"),
        ({"undo_seconds": -1}, "undo_seconds is a number of seconds"),
        ({"simulated": {"wrong": 0.1}}, "names a taste"),
        ({"simulated": {"taste": "brightness", "wrong": 2}}, "a share from 0 to 1"),
        ({"simulated": {"taste": "brightnes"}}, "Did you mean 'brightness'"),
    ],
)
def test_bad_options_are_refused_before_there_is_a_folder(
    options: dict[str, Any], said: str, tmp_path: Path, sd3_folder: Path, prompt_file: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        pixrl.align(recipe(sd3_folder, prompt_file, rewards=votes(**options)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_question_in_one_process() -> None:
    both = [RewardSetting(name="votes"), RewardSetting(name="others", kind="votes")]
    with pytest.raises(ConfigError, match="'votes' and 'others' both compare"):
        RewardSet(both, time_limit=None, max_failed_share=1).require_comparable(1)
    with pytest.raises(ConfigError, match="there are 2"):
        RewardSet(both[:1], time_limit=None, max_failed_share=1).require_comparable(2)


def test_a_full_disk_ends_the_run_and_says_that_the_votes_are_kept(tmp_path: Path) -> None:
    reward = VotesReward(simulated={"taste": "brightness"})
    reward.attend(tmp_path, {"brightness": Brightness()}, print)
    reward.score(batch_of(2, 2))
    ballots = reward._votes
    assert ballots is not None
    pages = ballots._base.execute("PRAGMA page_count").fetchone()[0]
    ballots._base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ServiceError, match=r"The votes cannot be kept: .*earlier"):
        reward.score(replace(batch_of(2, 2, step=1), prompts=["an owl " * 4000] * 4))
    reward.leave()
    assert [ballot.ranks is not None for ballot in all_votes(tmp_path)] == [True, True]


@pytest.mark.learning
@pytest.mark.slow
def test_what_the_voter_likes_rises(tmp_path: Path) -> None:
    """With a fifth of the votes wrong, held-out pictures of the same noises gain half their spread, past chance.

    The spread is the median deviation: what is drawn at night is far darker than the rest, whatever is learned.
    """
    settings = toy_recipe(votes(**simulated(0.2))[0], 12, 8e-3)
    settings |= {"rewards": votes(**simulated(0.2)), "evaluation": {"prompts": 12, "per_prompt": 1}}
    done = pixrl.align(settings, seed=0, out=tmp_path / "run")
    folder = RunFolder.open(done.run)
    before_B, after_B = (torch.tensor(sample_scores(folder, step)["brightness"]) for step in (0, 12))
    gain_B = after_B - before_B
    assert gain_B.mean() > float(stats.median_abs_deviation(before_B.numpy())) / 2
    assert stats.wilcoxon(gain_B.numpy(), alternative="greater").pvalue < 0.01
