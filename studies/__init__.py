"""Studies: recipes compared over seeds at equal budgets. `pixrl study` runs them in a checkout of the repository."""
