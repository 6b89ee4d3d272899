"""The error for input that the user can correct, and the end that a user asks for."""


class InputError(ValueError):
    """Bad input: one line that names the thing and the remedy. The command line prints it and exits with 2."""


class Stopped(Exception):
    """Work that a signal ended before its end, with nothing lost. The command line exits with 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
