"""Every method once more, as one plain loop each, from the papers and EQUATIONS.md: what the product must equal."""
