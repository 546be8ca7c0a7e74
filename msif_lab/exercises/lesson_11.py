"""Exercises of lesson 11."""

from ..marking import Exercise

EXERCISES: dict[str, Exercise] = {}
