"""Models and data of the other folders that studies are run on."""

from tests.align.conftest import prompt_file, sd3_folder
from tests.personalize.conftest import bare, flux_folder, policy, subjects

__all__ = ["bare", "flux_folder", "policy", "prompt_file", "sd3_folder", "subjects"]
