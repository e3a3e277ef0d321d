"""Schedules: functions of the number of applied updates, under optax's names and torch's."""
