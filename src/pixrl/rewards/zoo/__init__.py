"""Networks of published rewards, rewritten on transformers: nobody must read them to understand pixrl."""
