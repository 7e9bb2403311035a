"""How much a tuned model gained over its base: metrics with intervals, benchmarks, and what is written about them."""
