"""Errors a user can act on. Anything else that is raised is a bug."""


class UserError(Exception):
    """What was given, what is expected, what to do: one clear sentence, shown without a traceback."""


class ConfigError(UserError):
    """The configuration is missing, unreadable, or contradicts itself."""


class DataError(UserError):
    """A data file is missing, empty, lacks a column, or overlaps with another one."""


class ModelError(UserError):
    """A model directory cannot be used: no weights, no tokenizer, no chat template, too short a context."""


class RunError(UserError):
    """The run directory does not fit what is asked: other settings, another version, a missing input, no space."""


class ResourceError(UserError):
    """The cluster can never place what the configuration asks for, or lost what it had."""
