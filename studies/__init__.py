"""Studies: recipes compared over seeds at equal budgets. `pixrl study` runs them in a checkout of the repository."""

from pixrl.libraries import require

require("matplotlib", "study", "A study")
