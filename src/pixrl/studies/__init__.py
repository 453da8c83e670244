"""Studies: recipes compared over seeds at equal budgets."""
