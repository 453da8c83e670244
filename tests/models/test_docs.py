"""docs/models.md names what there is."""

from pathlib import Path

from pixrl.models import NOT_STATED, REGISTRY, RENDERERS, TOY, generator_licence
from pixrl.models.memory.plan import MemoryPlan, Offload
from pixrl.report.export import FILES

ADAPTERS = [REGISTRY.find(name) for name in RENDERERS]
PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")


def test_the_page_names_every_family_plan_and_file() -> None:
    pipelines = [pipeline for adapter in ADAPTERS for pipeline in adapter.pipelines]
    for name in (*RENDERERS, *pipelines, *MemoryPlan.model_fields, *FILES.values()):
        assert name in PAGE, name
    assert all(kind.value in PAGE for kind in Offload if kind is not Offload.NONE)


def test_the_page_names_every_licence() -> None:
    table = PAGE.partition("## Licences")[2]
    assert all(licence in table for adapter in ADAPTERS for licence in adapter.licences.values())


def test_where_a_licence_is_found(tmp_path: Path) -> None:
    assert generator_licence("toy:sd3") == TOY
    assert generator_licence("black-forest-labs/FLUX.1-schnell@main") == "Apache-2.0"
    assert generator_licence("nobody/nothing") == NOT_STATED
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: my-own\n---\n# Model\n")
    assert generator_licence(str(tmp_path)) == "my-own"
    (tmp_path / "README.md").write_text("# no front matter --- at all --- here\n")
    assert generator_licence(str(tmp_path)) == NOT_STATED
