"""The command line on a synthetic world: what it prints, what it refuses, and its exit codes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from pixrl import api, cli, libraries, workers
from pixrl.cli import demo
from pixrl.config import find_recipe
from pixrl.errors import RunError
from pixrl.jobs import fuse as fuse_job
from pixrl.runs.config import PERSONALIZE_RECIPE, SUBJECT_RECIPE
from pixrl.runs.folder import MANIFEST, RunFolder
from tests.fuse.world import fake_world

Pixrl = Callable[..., Result]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: fake_world())


@pytest.fixture
def pixrl() -> Pixrl:
    def run(*words: object) -> Result:
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    return run


SHORT = ("--budget", 8, "--set", "batch=4")


def test_fuse_says_what_it_chose_and_where_the_report_is(pixrl: Pixrl) -> None:
    done = pixrl("fuse", "owl", "snail", *SHORT, "--out", "run", "--seed", 3, "--keep", 2, "--alpha", 2)
    assert done.exit_code == 0, done.output
    assert "8 pictures" in done.output
    assert "Report: run/report.html" in done.output
    recipe = RunFolder.open(Path("run")).recipe()
    assert (recipe["concepts"], recipe["seed"], recipe["keep"], recipe["alpha"]) == (
        ["owl", "snail"],
        3,
        2,
        2.0,
    )


def test_a_recipe_gives_what_the_options_do_not(pixrl: Pixrl) -> None:
    Path("r.yaml").write_text("kind: fuse\nbudget: 6\nbatch: 3\nconcepts: [owl, snail]\nsampler: mean\n")
    assert pixrl("fuse", "--recipe", "r.yaml", "--out", "one").exit_code == 0
    assert (
        pixrl("fuse", "owl", "frog", "--recipe", "r.yaml", "--out", "two", "--sampler", "random").exit_code
        == 0
    )
    assert len(RunFolder.open(Path("one")).manifest()) == 6
    two = RunFolder.open(Path("two")).recipe()
    assert (two["concepts"], two["sampler"], two["budget"]) == (["owl", "frog"], "random", 6)


def test_without_out_each_run_gets_a_folder_of_its_own(pixrl: Pixrl) -> None:
    for _ in range(2):
        assert pixrl("fuse", "owl", "snail", *SHORT).exit_code == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_pairs_and_compare(pixrl: Pixrl) -> None:
    Path("pairs.txt").write_text("owl & snail\n frog  &car\n")
    assert pixrl("fuse", "--pairs", "pairs.txt", *SHORT, "--out", "pairs").exit_code == 0
    assert Path("pairs/report.html").is_file()
    done = pixrl("fuse", "owl", "snail", *SHORT, "--compare", "rmler, random", "--out", "both")
    assert done.exit_code == 0, done.output
    assert Path("both/report.html").is_file()


def test_select_and_report_generate_nothing(pixrl: Pixrl) -> None:
    pixrl("fuse", "owl", "snail", *SHORT, "--out", "run")
    before = Path("run", MANIFEST).read_bytes()
    Path("run/report.html").unlink()
    assert pixrl("report", "run").exit_code == 0
    assert Path("run/report.html").is_file()
    done = pixrl("select", "run", "--presence", "-0.9", "--balance", "1.9", "--keep", "1")
    assert done.exit_code == 0
    assert "2 of 2 pictures of the pool are candidates" in done.output
    done = pixrl("select", "run", "--presence", "-0.9", "--balance", "1.9", "--keep", "1", "--everywhere")
    assert "8 of 8 pictures are candidates" in done.output
    assert Path("run", MANIFEST).read_bytes() == before


def test_demo_takes_a_free_folder_each_time(pixrl: Pixrl, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load(find_recipe(demo.ALIGN_RECIPE).read_text())
    settings |= {"steps": 1, "prompts": {"per_step": 2}, "exploration": {"kind": "noise", "noises": 2}}
    settings["evaluation"] = {"prompts": 2}
    Path("small.yaml").write_text(yaml.safe_dump(settings))
    kept = yaml.safe_load(find_recipe(demo.PERSONALIZE_RECIPE).read_text())
    kept |= {name: settings[name] for name in ("steps", "prompts", "exploration", "evaluation")}
    Path("kept.yaml").write_text(yaml.safe_dump(kept))
    monkeypatch.setattr(demo, "DEMO_PAIRS", ("owl & snail",))
    monkeypatch.setattr(demo, "ALIGN_RECIPE", "small.yaml")
    monkeypatch.setattr(demo, "PERSONALIZE_RECIPE", "kept.yaml")
    monkeypatch.setattr(
        workers, "cores", lambda: 1
    )  # the fusions in this process, which has a world of its own
    Path("pixrl-demo").mkdir()
    done = pixrl("demo")
    assert done.exit_code == 0, done.output
    assert len(list(Path("pixrl-demo-2/subject").glob("*.png"))) == 4
    for part in ("fuse", "align", "personalize"):
        assert Path(f"pixrl-demo-2/{part}/report.html").is_file()
        assert f"pixrl-demo-2/{part}/report.html" in done.output.replace("\n", "")


def test_personalize_without_a_recipe_takes_the_one_that_its_help_names(pixrl: Pixrl) -> None:
    told = " ".join(pixrl("personalize", "--help").output.replace("│", " ").split())
    for subject, usual in ((None, PERSONALIZE_RECIPE), ("owl", SUBJECT_RECIPE)):
        assert usual in told
        config, _ = api.load_personalize(None, subject=subject)
        assert config.loss.kind == "nft"  # the clipped loss walks at random here: docs/studies/personalize.md
        assert api.load_personalize(usual, subject=subject)[0] == config


def test_ctrl_c_says_how_to_go_on_and_resume_ends_as_if_unbroken(
    pixrl: Pixrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pixrl("fuse", "owl", "snail", *SHORT, "--out", "whole").exit_code == 0
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: fake_world(die_after=13))
    broken = pixrl("fuse", "owl", "snail", *SHORT, "--out", "broken")
    assert broken.exit_code == 130
    assert "pixrl resume broken" in broken.stderr
    assert len(RunFolder.open(Path("broken")).manifest()) < 8
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: fake_world())
    assert pixrl("resume", "broken").exit_code == 0
    assert Path("broken", MANIFEST).read_bytes() == Path("whole", MANIFEST).read_bytes()


def test_ctrl_c_before_the_run_began(pixrl: Pixrl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_job, "load_world", lambda *given: fake_world(die_after=0))
    broken = pixrl("fuse", "owl", "snail", *SHORT, "--out", "broken")
    assert (broken.exit_code, "Interrupted" in broken.stderr) == (130, True)


def test_resume_repairs_a_damaged_manifest_when_asked(pixrl: Pixrl, caplog: pytest.LogCaptureFixture) -> None:
    pixrl("fuse", "owl", "snail", *SHORT, "--out", "run")
    manifest = Path("run", MANIFEST)
    whole = manifest.read_bytes()
    lines = whole.splitlines(keepends=True)
    manifest.write_bytes(b"".join([*lines[:5], b"x" + lines[5], *lines[6:]]))
    refused = pixrl("resume", "run")
    assert refused.exit_code == 1
    assert "line 6" in refused.stderr
    assert "--repair" in refused.stderr
    with caplog.at_level(logging.WARNING):
        assert pixrl("resume", "run", "--repair").exit_code == 0
    assert manifest.read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fuse"], "at least two concepts; none was given"),
        (["fuse", "owl"], "at least two concepts; only 'owl' was given"),
        (["fuse", "owl", "Owl"], "'Owl' is given twice"),
        (["fuse", "owl", ""], "A concept is empty"),
        (["fuse", "owl", "unicorn"], "unicorn"),
        (["fuse", "owl", "snail", "--bugdet", "3"], "--budget"),
        (["fuse", "owl", "snail", "--budget", "many"], "integer"),
        (["fuse", "owl", "snail", "--budget", "8"], "a budget of 8 pictures is below one batch of 16"),
        (["fuse", "owl", "snail", "--sampler", "rmlr"], "Did you mean 'rmler'"),
        (["fuse", "owl", "snail", "--set", "bacth=4"], "Did you mean 'batch'"),
        (["fuse", "owl", "snail", "--set", "options.lrr=4"], "Did you mean"),
        (["fuse", "owl", "snail", "--budget", "32", "--set", "budget=64"], "budget is given twice"),
        (["fuse", "owl", "snail", "--compare", "rmler,rndom"], "Did you mean 'random'"),
        (["fuse", "owl", "snail", "--compare", "rmler"], "--compare needs two or more"),
        (["fuse", "owl", "snail", "--compare", "all", "--sampler", "ppo"], "give one of them"),
        (["fuse", "owl", "snail", "--recipe", "nowhere"], "No recipe 'nowhere'"),
        (["fuse", "--pairs", "nowhere.txt"], "nowhere.txt"),
        (["fuse", "--pairs", "bad.txt"], "bad.txt, line 2"),
        (["fuse", "owl", "snail", "--pairs", "bad.txt"], "leave out CONCEPTS"),
        (["fuze"], "fuze"),
        (["resume"], "RUN"),
        (["select", "run", "--keep", "0"], "keep"),
        (["toy", "verify", "clipp"], "Did you mean 'clip'"),
        (["toy", "build", "--stage", "sd4"], "There is no stage 'sd4'"),
    ],
)
def test_usage_errors_name_the_mistake_and_exit_2(pixrl: Pixrl, words: list[str], message: str) -> None:
    Path("bad.txt").write_text("owl & snail\nowl snail\n")
    if words[0] == "select":
        pixrl("fuse", "owl", "snail", *SHORT, "--out", "run")
    done = pixrl(*words)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["resume", "select", "report"])
def test_a_run_that_is_not_there_is_an_error(pixrl: Pixrl, command: str) -> None:
    done = pixrl(command, "nowhere")
    assert done.exit_code == 1
    assert "There is no run folder" in done.stderr


def test_an_existing_run_is_kept_unless_forced(pixrl: Pixrl) -> None:
    assert pixrl("fuse", "owl", "snail", *SHORT, "--out", "run").exit_code == 0
    before = Path("run", MANIFEST).read_bytes()
    refused = pixrl("fuse", "owl", "frog", *SHORT, "--out", "run")
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert Path("run", MANIFEST).read_bytes() == before
    assert pixrl("fuse", "owl", "frog", *SHORT, "--out", "run", "--force").exit_code == 0
    assert RunFolder.open(Path("run")).recipe()["concepts"] == ["owl", "frog"]


def test_a_run_that_fails_exits_1_without_a_traceback(pixrl: Pixrl, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **more: object) -> None:
        raise RunError("The disk is full.")

    monkeypatch.setattr(api, "run_fuse", fail)
    done = pixrl("fuse", "owl", "snail")
    assert (done.exit_code, done.stderr) == (1, "Error: The disk is full.\n")


def test_an_error_of_the_file_system_names_the_file(pixrl: Pixrl) -> None:
    Path("file").touch()
    done = pixrl("fuse", "owl", "snail", *SHORT, "--out", "file/run")
    assert done.exit_code == 1
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_fails_when_a_gate_does(pixrl: Pixrl, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixrl.toy import verify

    gates = [verify.Gate("clip", "retrieval", 0.95, 0.9), verify.Gate("sd3", "overall", 0.9, 0.45, 0.8)]
    monkeypatch.setattr(verify, "verify", lambda names, quick: gates)
    done = pixrl("toy", "verify", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert [found["passed"], *(gate["passed"] for gate in found["gates"])] == [False, True, False]
    assert found["gates"][0] == {
        "checkpoint": "clip", "figure": "retrieval", "value": 0.95, "at_least": 0.9, "at_most": None, "passed": True,
    }  # fmt: skip
    monkeypatch.setattr(verify, "verify", lambda names, quick: gates[:1])
    done = pixrl("toy", "verify")
    assert (done.exit_code, "ok" in done.stdout, "0.950" in done.stdout) == (0, True, True)


def test_toy_build_hands_its_options_over(pixrl: Pixrl, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_build

    seen = []

    def fake_build(stages: list[str], **given: object) -> Path:
        seen.append((stages, given))
        return Path("here")

    monkeypatch.setattr(toy_build, "build", fake_build)
    done = pixrl("toy", "build", "--stage", "clip", "--stage", "vae", "--out", "x", "--device", "cuda")
    assert (done.exit_code, done.stdout) == (0, "Checkpoints: here\n")
    assert seen == [(["clip", "vae"], {"out": Path("x"), "device": "cuda"})]


def test_toy_build_can_be_interrupted(pixrl: Pixrl, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_build

    def stop(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_build, "build", stop)
    done = pixrl("toy", "build")
    assert (done.exit_code, "goes on where it stopped" in done.stderr) == (130, True)


def test_toy_build_without_the_repository_says_what_to_type(
    pixrl: Pixrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "CHECKOUT", tmp_path)
    done = pixrl("toy", "build")
    assert (done.exit_code, done.stderr) == (
        2,
        "Error: Builds of the toy checkpoints need a checkout of the repository, and pixrl is installed here without "
        "it. In a checkout, type: pip install -e . && pixrl toy build ...\n",
    )


def test_the_demo_uses_words_of_the_toy_world() -> None:
    from pixrl.data.pairs import parse_pairs
    from pixrl.toy.vocabulary import KINDS

    words = {concept for pair in parse_pairs(demo.DEMO_PAIRS).pairs for concept in pair}
    assert words <= set(KINDS)


@pytest.mark.parametrize(("code", "ended"), [(None, 0), (0, 0), (3, 3), ("a message", 1)])
def test_one_of_several_processes_ends_at_once_with_its_code(
    code: object, ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        raise SystemExit(code)

    ends: list[int] = []
    monkeypatch.setattr(cli, "app", run)
    monkeypatch.setattr(cli.os, "_exit", ends.append)
    with pytest.raises(SystemExit):
        cli.main()
    assert not ends  # alone it ends as any program does
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(SystemExit):  # the real _exit does not come back
        cli.main()
    assert ends == [ended]


def test_no_command_prints_the_advice_of_a_library_that_users_did_not_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "app", lambda: None)
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(advice, "level", logging.NOTSET)
    cli.main()
    assert not advice.isEnabledFor(logging.WARNING) and advice.isEnabledFor(logging.ERROR)
