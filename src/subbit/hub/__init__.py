"""Packed models on disk and in transformers: save, load, inspect. Light to import."""
