"""What a personalize run is made from: an align recipe whose prompts come with subjects.

Customized-GRPO is noise exploration x random steps x (synergy, time weights) x clipped; every other combination runs.
"""

from typing import Any

from pydantic import Field, model_validator

from pixrl.config import Count, Settings, Side
from pixrl.models.flux import Preset, Shift
from pixrl.runs.align_config import AlignConfig, PromptSettings


class SubjectSettings(PromptSettings):
    """Which subjects, with which prompts; each pair of them makes one group."""

    source: str = "toy:subjects"
    """toy:subjects, a subject's folder, a folder of such folders, DreamBench, or a UNO list (docs/data.md)."""
    per_step: Count = 4
    """P: pairs of a prompt and a subject in a training step."""


class ReferenceSettings(Settings):
    """How the model is shown a subject."""

    count: int | None = Field(1, ge=1, le=64)
    """Pictures of each subject, the first ones; none: all."""
    side: Side | None = None
    """Pixels of the square that each is laid out on; none: the pictures' own resolution."""
    preset: Preset | None = None
    """Position ids of their tokens, uno or kontext; none: what the checkpoint's card says, else uno."""
    shift: Shift | None = None
    """Schedule shift, flux or uno; none: flux. One schedule serves sampling and training."""


class PersonalizeConfig(AlignConfig):
    """One personalization run."""

    model: str = "toy:flux"
    """toy:flux, a FLUX folder in diffusers' layout, a hub id (owner/name@revision), or FILE.safetensors@CONFIG."""
    prompts: SubjectSettings = SubjectSettings()
    references: ReferenceSettings = ReferenceSettings()

    @model_validator(mode="before")
    @classmethod
    def _former_name(cls, given: Any) -> Any:
        """`references.lora`, as recipes of before it served every model named `lora.base`."""
        references = given.get("references") if isinstance(given, dict) else None
        if not isinstance(references, dict) or "lora" not in references:
            return given
        former, lora = references["lora"], given.get("lora") or {}
        if former is None or not isinstance(lora, dict):
            pass
        elif lora.get("base") not in (None, former):
            raise ValueError(
                f"references.lora ({former}) is the former name of lora.base ({lora['base']}): give lora.base alone"
            )
        else:
            lora = {**lora, "base": former}
        others = {name: value for name, value in references.items() if name != "lora"}
        return {**given, "references": others, "lora": lora}

    @model_validator(mode="after")
    def _subjects_have_no_columns(self) -> "PersonalizeConfig":
        for part, settings in (("prompts", self.prompts), ("evaluation", self.evaluation)):
            if settings.column is not None:
                raise ValueError(f"{part}.column has no effect: subjects have no columns. Leave it out")
        return self
