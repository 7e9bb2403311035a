"""A page in the browser that asks several models and collects blind votes."""
