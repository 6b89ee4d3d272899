"""Benchmarks, which are run by hand: a speed belongs here and in no test."""
