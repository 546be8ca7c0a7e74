"""Exercises of lesson 03."""

from ..marking import Exercise

EXERCISES: dict[str, Exercise] = {}
