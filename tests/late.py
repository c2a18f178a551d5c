"""Modules that are loaded by the tests that use them: collecting all tests stays quick."""

from importlib import import_module


class Late:
    """A module under its name, loaded when something of it is asked for."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        return getattr(import_module(self._name), name)
