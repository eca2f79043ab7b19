"""GenRef: where its records come from, which are drawn, and what becomes of them."""
