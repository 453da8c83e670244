"""RMLer and the samplers that it is compared with: each proposes mixing coefficients and learns from scores."""
