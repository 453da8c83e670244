"""Under which licence the weights of published generators are given out. Loads no torch."""

from pathlib import Path

from pixrl.config import parse_yaml
from pixrl.errors import ConfigError
from pixrl.hub_fetch import split_revision

NOT_STATED = "not stated: see the model's page"
LICENCES = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "Stability AI Community License",
    "stabilityai/stable-diffusion-3.5-medium": "Stability AI Community License",
    "stabilityai/stable-diffusion-3.5-large": "Stability AI Community License",
    "stabilityai/stable-diffusion-3.5-large-turbo": "Stability AI Community License",
    "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
    "stabilityai/sdxl-turbo": "Stability AI Non-Commercial Research Community License",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial License",
    "black-forest-labs/FLUX.1-Kontext-dev": "FLUX.1 [dev] Non-Commercial License",
    "black-forest-labs/FLUX.1-schnell": "Apache-2.0",
    "bytedance-research/UNO": "CC BY-NC 4.0",
}
"""Hub id -> licence, as known when this was written; its page decides. A local folder's own README wins."""
TOY = "Apache-2.0 (part of pixrl)"


def generator_licence(ref: str) -> str:
    """What is known about the licence of a generator's weights: its README's, the published one, or that none is."""
    if ref.startswith("toy:"):
        return TOY
    stated = _front_matter(Path(ref) / "README.md")
    return stated or LICENCES.get(split_revision(ref)[0], NOT_STATED)


def _front_matter(readme: Path) -> str | None:
    """`license_name` or `license` of a README's front matter."""
    if not readme.is_file():
        return None
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        fields = parse_yaml(parts[1], str(readme))
    except ConfigError:
        return None
    found = fields.get("license_name") or fields.get("license") if isinstance(fields, dict) else None
    return None if found is None else str(found)
