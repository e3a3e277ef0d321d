"""Optimizers: one file for each family, each optimizer one function."""
