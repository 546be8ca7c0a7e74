"""Exercises of lesson 02."""

from ..marking import Exercise

EXERCISES: dict[str, Exercise] = {}
