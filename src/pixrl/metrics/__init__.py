"""The figures over pictures and runs: intervals, diversity, GenEval, fusion."""
