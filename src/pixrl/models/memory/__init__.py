"""The memory that a model takes: what is planned, found out beforehand, quantized, divided and moved."""
