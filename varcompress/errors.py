"""The error for input that the user can correct."""


class InputError(ValueError):
    """Bad input: one line that names the thing and the remedy. The command line prints it and exits with 2."""
