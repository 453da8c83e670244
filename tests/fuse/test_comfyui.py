"""ComfyUI's node pack against pixrl's own mixing, on conditionings in ComfyUI's layout; pixrl is not imported by it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

from pixrl import cli
from pixrl.algorithms import make_mixing
from pixrl.algorithms.fusion.mixing import (
    ColumnsSettings,
    Pooled,
    SpatialSettings,
    StepsSettings,
    TokensSettings,
    VelocitySettings,
)
from pixrl.errors import ConfigError, InputError, RunError
from pixrl.fusion.config import FuseConfig
from pixrl.jobs.fuse import start
from pixrl.models.base import Conditioning, Mixture
from pixrl.report.export import coefficients_bytes, export_child
from pixrl.runs.folder import RunFolder
from pixrl.runs.log import load_coefficients
from tests.fuse.world import fake_world

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
N, L, D, E = 2, 5, 12, 7


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    """The folder as ComfyUI loads it: a package from its __init__.py."""
    spec = importlib.util.spec_from_file_location("comfyui_pack", PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_pack"] = module
    spec.loader.exec_module(module)
    return module


def sources(count: int = N, dtype: torch.dtype = torch.float32, pooled: bool = True) -> Conditioning:
    tokens_BLD = torch.randn(count, L, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    pooled_BE = torch.randn(count, E, generator=torch.Generator().manual_seed(2)).to(dtype)
    return Conditioning(tokens_BLD, pooled_BE if pooled else None)


def comfy(found: Conditioning, **more: Any) -> list[list[list[Any]]]:
    """One conditioning a row, as CLIPTextEncode returns it."""
    made = []
    for row in range(len(found)):
        options: dict[str, Any] = dict(more)
        if found.pooled_BE is not None:
            options["pooled_output"] = found.pooled_BE[row : row + 1]
        made.append([[found.tokens_BLD[row : row + 1], options]])
    return made


def written(path: Path, values_ND: Tensor, **settings: Any) -> str:
    concepts = ("owl", "snail", "cup", "bee")[: len(values_ND)]
    config = FuseConfig(concepts=concepts, **settings)
    path.write_bytes(coefficients_bytes(values_ND, config, [f"a photo of a {c}" for c in concepts], 7))
    return str(path)


def drawn(columns: int, count: int = N) -> Tensor:
    """Coefficients that sum to one over the concepts, some of them outside [0, 1]."""
    values_ND = torch.randn(count, columns, generator=torch.Generator().manual_seed(3))
    values_ND[-1] = 1 - values_ND[:-1].sum(dim=0)
    return values_ND


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    ("mixing", "pooled", "columns"),
    [
        (ColumnsSettings(), Pooled.WEIGHT, D),
        (ColumnsSettings(), Pooled.AVERAGE, D),
        (ColumnsSettings(), Pooled.COLUMNS, D + E),
        (TokensSettings(), Pooled.WEIGHT, L),
        (TokensSettings(), Pooled.AVERAGE, L),
    ],
)
def test_the_node_mixes_what_pixrl_mixes_to_the_last_bit(
    pack: ModuleType,
    tmp_path: Path,
    mixing: Any,
    pooled: Pooled,
    columns: int,
    count: int,
    dtype: torch.dtype,
) -> None:
    found, values_ND = sources(count, dtype), drawn(columns, count)
    wanted = make_mixing(mixing, found, 4, pooled).mix(values_ND[None])
    assert isinstance(wanted, Conditioning) and wanted.pooled_BE is not None
    file = written(tmp_path / "one.safetensors", values_ND, mixing=mixing, pooled=pooled)
    node = pack.NODE_CLASS_MAPPINGS["PixrlFusion"]()
    ((tokens, options),) = node.fuse(file, *comfy(found, guidance=3.5))[0]
    assert tokens.dtype == dtype and torch.equal(tokens, wanted.tokens_BLD)
    assert torch.equal(options["pooled_output"], wanted.pooled_BE) and options["guidance"] == 3.5


def test_a_concept_with_all_of_the_weight_is_its_own_conditioning(pack: ModuleType, tmp_path: Path) -> None:
    found = sources()
    file = written(tmp_path / "one.safetensors", torch.tensor([[0.0], [1.0]]).expand(N, D))
    ((tokens, options),) = pack.nodes.mix(pack.nodes.read(file), comfy(found))
    assert torch.equal(tokens, found.tokens_BLD[1:]) and torch.equal(
        options["pooled_output"], found.pooled_BE[1:]
    )
    ((tokens, options),) = pack.nodes.mix(pack.nodes.read(file), comfy(sources(pooled=False)))
    assert torch.equal(tokens, found.tokens_BLD[1:]) and "pooled_output" not in options


def test_predictions_are_averaged_by_strengths(pack: ModuleType, tmp_path: Path) -> None:
    found, values_ND = sources(), torch.tensor([[0.3], [0.7]])
    mixture = make_mixing(VelocitySettings(), found, 4, Pooled.WEIGHT).mix(values_ND[None])
    assert isinstance(mixture, Mixture)
    file = written(tmp_path / "one.safetensors", values_ND, mixing=VelocitySettings())
    entries = pack.nodes.mix(pack.nodes.read(file), comfy(found))
    assert [options["strength"] for _, options in entries] == mixture.weights_S[0][0, :, 0, 0].tolist()
    for (tokens, options), row in zip(entries, range(N), strict=True):
        assert torch.equal(tokens[0], found.tokens_BLD[row]) and torch.equal(
            options["pooled_output"][0], found.pooled_BE[row]
        )


def refusal(pack: ModuleType, file: str, conditionings: list[Any]) -> str:
    with pytest.raises(ValueError) as refused:
        pack.nodes.mix(pack.nodes.read(file), conditionings)
    said = str(refused.value)
    assert "\n" not in said
    return said


def test_what_does_not_fit_is_refused_in_a_sentence(pack: ModuleType, tmp_path: Path) -> None:
    file = written(tmp_path / "one.safetensors", drawn(D + 1))
    assert refusal(pack, file, comfy(sources())) == (
        f"The coefficients of owl + snail have {D + 1} columns and these conditionings have {D}: use the text encoders "
        "of toy:turbo, with which they were made."
    )
    fits = written(tmp_path / "two.safetensors", drawn(D))
    assert "are of 2 concepts (owl + snail) and 3 conditionings" in refusal(pack, fits, comfy(sources(3)))
    longer = comfy(Conditioning(torch.zeros(1, L + 1, D), torch.zeros(1, E)))
    assert f"have {L} × {D} and {L + 1} × {D} tokens" in refusal(pack, fits, [comfy(sources())[0], *longer])
    wider = comfy(Conditioning(torch.zeros(1, L, D), torch.zeros(1, E + 1)))
    assert "pooled features differ" in refusal(pack, fits, [comfy(sources())[0], *wider])
    assert "attention_mask" in refusal(pack, fits, comfy(sources(), attention_mask=torch.ones(1, L)))
    combined = [comfy(sources())[0] * 2, comfy(sources())[1]]
    assert "of 'owl' is itself a combination" in refusal(pack, fits, combined)
    own = written(tmp_path / "three.safetensors", drawn(D + E), pooled="columns")
    assert "which these conditionings lack" in refusal(pack, own, comfy(sources(pooled=False)))
    steps = written(tmp_path / "four.safetensors", drawn(1), mixing=StepsSettings())
    assert "'steps' changes with the sampling step" in refusal(pack, steps, comfy(sources()))


def test_a_file_that_is_none_is_refused_in_a_sentence(pack: ModuleType, tmp_path: Path) -> None:
    other, broken = tmp_path / "other.safetensors", tmp_path / "broken.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, other)
    broken.write_bytes(b"x" * 40)
    half = tmp_path / "half.safetensors"
    safetensors.torch.save_file(
        {"coefficients_ND": torch.zeros(2, 3)}, half, {"format": "pixrl-coefficients"}
    )
    for file, said in (
        (tmp_path / "gone", "There is no file"),
        (other, "holds no coefficients of pixrl"),
        (broken, "is damaged"),
        (half, "is damaged"),
    ):
        with pytest.raises(ValueError, match=said):
            pack.nodes.read(str(file))


def test_the_pack_needs_no_pixrl() -> None:
    code = (
        "import sys; sys.modules['pixrl'] = None; sys.path.insert(0, sys.argv[1]); import comfyui; "
        "print(*comfyui.NODE_CLASS_MAPPINGS, *comfyui.NODE_DISPLAY_NAME_MAPPINGS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(PACK.parent)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["PixrlFusion", "PixrlFusion"]
    kinds = ("STRING", "CONDITIONING")
    assert all(kind in (PACK / "nodes.py").read_text() for kind in kinds)


def test_a_childs_coefficients_are_exported_and_mix_as_in_the_run(pack: ModuleType, tmp_path: Path) -> None:
    config = FuseConfig(concepts=("owl", "snail"), budget=24, batch=8, exemplars=2, presence=-0.9, balance=9)
    world = fake_world()
    run = start(config, tmp_path / "run", world=world)
    path = run.folder.path
    done = CliRunner().invoke(cli.app, ["export", str(path), "--child", "13"])
    assert done.exit_code == 0, done.output
    assert f"Coefficients of child 13: {path}/export/comfyui/child-000013.safetensors" in done.output
    prompts = [world.prompt(concept) for concept in config.concepts]
    assert all(prompt in done.output for prompt in prompts)
    row = run.rows[13]
    first = min(one.index for one in run.rows if one.step == row.step)
    values_ND = load_coefficients(RunFolder.open(path), row.step)[13 - first]
    found = pack.nodes.read(str(path / "export/comfyui/child-000013.safetensors"))
    assert torch.equal(found.values_ND, values_ND) and found.concepts == config.concepts
    encoded = world.renderer.encode(prompts)
    wanted = world.mixing(config).mix(values_ND[None])
    assert torch.equal(pack.nodes.mix(found, comfy(encoded))[0][0], wanted.tokens_BLD)
    best = export_child(path, out=tmp_path / "else")
    assert best.child == run.selection.indices[0] and best.file.parent == tmp_path / "else"
    with safetensors.safe_open(best.file, "pt") as content:
        about = content.metadata()
    assert json.loads(about["prompts"]) == prompts and about["seed"] == str(run.rows[best.child].seed)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    config = FuseConfig(concepts=("owl", "snail"), budget=8, batch=8, exemplars=2)
    path = start(config, tmp_path / "run", world=fake_world()).folder.path
    with pytest.raises(InputError, match=r"There is no child 8: .* has 8, numbered from 0"):
        export_child(path, 8)
    (path / "selection.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        export_child(path)
    for option in (["--slot", "ema"], ["--format", "uno"]):
        done = CliRunner().invoke(cli.app, ["export", str(path), "--child", "1", *option])
        assert done.exit_code == 2 and f"{option[0]} is for trained weights" in done.output
    align = CliRunner().invoke(cli.app, ["export", str(tmp_path / "gone"), "--child", "1"])
    assert align.exit_code == 1


def test_a_mixing_that_changes_with_the_step_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FuseConfig(
        concepts=("owl", "snail"), budget=8, batch=8, exemplars=2, mixing=SpatialSettings(start=1)
    )
    folder = RunFolder.create(tmp_path / "run", kind="fuse", recipe=config)
    with pytest.raises(ConfigError, match="are mixed by spatial here, which changes with the sampling step"):
        export_child(folder.path, 0)
