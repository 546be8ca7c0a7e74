"""Exercises of lesson 01."""

from ..marking import Exercise

EXERCISES: dict[str, Exercise] = {}
