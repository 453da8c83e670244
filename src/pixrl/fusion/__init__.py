"""What a fusion needs beside its sampler: the generator with its scorer, shared noise, selection and its thresholds."""
