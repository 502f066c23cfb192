"""Mechanism: what a step appends, evicts and attends, around a stock backend."""
