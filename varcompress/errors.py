"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Bad input: one line that names the thing and the remedy. The command line prints it and exits with 2."""
