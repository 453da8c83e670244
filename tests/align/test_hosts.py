"""Several hosts: two launchers on one machine, each told that it is one of two, as docs/scaling.md has them typed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from pixrl.algorithms.world import Team, limit_threads, sharers
from pixrl.errors import RunError
from pixrl.jobs.align import start
from pixrl.runs.config import load_recipe
from pixrl.runs.folder import RunFolder
from tests.align.launching import Launch, free_port
from tests.align.parts import final, recipe, same
from tests.align.test_processes import environment, processes_of, write_recipe

Launcher = Callable[[Path, int, str], list[str]]
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def by_torchrun(folder: Path, host: int, port: str) -> list[str]:
    """The page's line for a host, with one process each and this machine's address."""
    lines = re.findall(r"^torchrun --nnodes 2 .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(lines[host])
    assert words[words.index("--node-rank") + 1] == str(host)
    places = {"--nproc-per-node": "1", "--master-addr": "127.0.0.1", "--master-port": port}
    for name, value in places.items():
        words[words.index(name) + 1] = value
    return ["-m", "torch.distributed.run", *words[1 : words.index("pixrl")]]


def by_accelerate(folder: Path, host: int, port: str) -> list[str]:
    """The page's config for both hosts, with one process each and this machine's address."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    file = folder / f"hosts-{host}.yaml"
    place = {"num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": int(port)}
    file.write_text(yaml.safe_dump({**yaml.safe_load(text), **place}))
    return ["-m", "accelerate.commands.launch", "--config_file", str(file), "--machine_rank", str(host), "-m"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_torchrun, by_accelerate], ids=["torchrun", "accelerate"])
def test_two_hosts_end_as_one_with_two_processes(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch, launcher: Launcher
) -> None:
    settings = recipe(sd3_folder, prompt_file, steps=1)
    settings["prompts"]["per_step"] = 3  # shared out as 1 and 2
    file = str(write_recipe(tmp_path, settings))
    port, hosts = str(free_port()), tmp_path / "hosts"
    words = ["pixrl", "align", file, "--out", str(hosts)]
    begun = [
        subprocess.Popen([sys.executable, *launcher(tmp_path, host, port), *words], env=environment())
        for host in (0, 1)
    ]
    try:
        assert [one.wait(600) for one in begun] == [0, 0]
    finally:
        for one in begun:
            one.kill()
    assert processes_of(hosts) == 2
    assert launch(2, "align", file, "--out", str(tmp_path / "one")) == [0, 0]
    assert same(final(hosts), final(tmp_path / "one"))
    assert len(RunFolder.open(hosts).manifest()) == 9


def test_a_folder_that_one_host_does_not_see_is_refused(
    tmp_path: Path, sd3_folder: Path, prompt_file: Path, launch: Launch
) -> None:
    """Each process has a working folder of its own, as hosts have disks of their own, and --out is no full path."""
    file = str(write_recipe(tmp_path, recipe(sd3_folder, prompt_file, steps=1)))
    assert launch(2, file, str(tmp_path), act=_apart) == [0, 0]
    assert not (tmp_path / "1").joinpath("run").exists()


def _apart(file: str, folder: str) -> None:
    place = Path(folder) / os.environ["RANK"]
    place.mkdir()
    os.chdir(place)
    with pytest.raises(
        RunError, match=r"Process 0 made run, and process 1 does not see it.*give --out as a full path"
    ):
        start(load_recipe(file), Path("run"))


def test_a_model_is_divided_within_a_host(launch: Launch) -> None:
    """Four processes on two hosts: two copies of two parts; where each host has one process, one copy of all."""
    assert [sharers(4, 2), sharers(4, 1), sharers(4, 4), sharers(3, 2)] == [2, 4, 4, 3]
    assert launch(4, act=_copies) == [0] * 4


def _copies() -> None:
    rank = int(os.environ["RANK"])
    for local, parts in ((2, [rank // 2 * 2, rank // 2 * 2 + 1]), (1, [0, 1, 2, 3])):
        os.environ["LOCAL_WORLD_SIZE"] = str(local)
        assert Team("cpu").mesh().mesh.tolist() == parts


def test_a_host_divides_its_threads_among_its_own_processes(launch: Launch) -> None:
    assert launch(2, act=_threads) == [0, 0]


def _threads() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    team = Team("cpu")
    assert (team.size, team.local) == (2, 1)
    torch.set_num_threads(4)
    limit_threads(team.local)
    assert torch.get_num_threads() == 4
    del os.environ["LOCAL_WORLD_SIZE"]
    assert team.local == 2
    limit_threads(team.local)
    assert torch.get_num_threads() == 2
